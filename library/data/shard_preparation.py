"""Latents prepared into shards: several processes encode each image into a part, and put the parts together."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from library.config.digests import digest
from library.config.errors import UserError
from library.config.leftovers import remove_leftovers
from library.data.columns import Texts
from library.data.latent_cache import CachedLatents, cache_path, read_fitting, write_cache
from library.data.latent_entries import Entries, States, states_of
from library.data.latent_files import Done, Work, dealt, demands_of, joined, report_redone
from library.data.latent_index import index_beside
from library.data.latent_preparation import encode_images, require_disk_for_latents
from library.data.latent_shards import SHARD_SUFFIX, Shard, open_shard, shards_path
from library.data.shard_writing import ROWS, SHARD_NAME, Member, write_manifest, write_shard
from library.data.stored_arrays import BF16, FLOAT32
from library.images.buckets import BucketedImage

log = logging.getLogger(__name__)

_PARTS = "parts"


def prepare_shards(images: Mapping[str, BucketedImage], work: Work, dtype: str) -> Done:
    """Write shards of images, whose latents are kept in the torch dtype of that name; return what became of them.

    The shards do not depend on the number of processes. They are those of the metadata once the manifest names them;
    until then those that were there before are. Raise `UserError` if the disk has no room for them.
    """
    if dtype != "float32":
        log.info("latents are kept in %s: half as large as in float32, and other numbers to train on", dtype)
    making = _Making(work, getattr(torch, dtype))
    done = making.shards(images)
    if work.share.is_first:
        making.finish(done)
    return done


class _Making:
    """The shards beside a metadata file, in the making."""

    def __init__(self, work: Work, dtype: torch.dtype):
        self._work, self._dtype, self._share = work, dtype, work.share
        self._folder = shards_path(work.out_json)
        self._parts = self._folder / _PARTS
        self._old: dict[str, tuple[Shard, int]] = {}

    def shards(self, images: Mapping[str, BucketedImage]) -> Done:
        """Write the shards; return what became of the images of all processes, the same in each."""
        self._begin(images)
        done, entries = Done(), self._entries(images)
        rows = {key: row for row, key in enumerate(images)}
        with tqdm(total=len(images), desc="latents", unit="image", disable=not self._share.is_first) as progress:
            for number, keys in enumerate(_keys_of_shards(images)):
                members = {key: images[key] for key in keys}
                is_own = self._share.has(number)
                states = {key: states_of(each.path, each.mask) for key, each in members.items() if is_own}
                for failed, stale in self._share.gathered(self._encode_share(members, done)):
                    for key in failed:
                        del members[key]
                    for key in stale:
                        self._old.pop(key, None)
                if members and is_own:
                    done.shards.append(self._shard_of(members, entries, rows, states))
                progress.update(len(keys))
        self._share.in_turn(entries.save)
        return joined(self._share.gathered(done))

    def finish(self, done: Done) -> None:
        """Let the new shards be those of the metadata, and remove the older ones."""
        write_manifest(self._folder, done.shards)
        for path in self._folder.glob(f"*{SHARD_SUFFIX}"):
            if SHARD_NAME.fullmatch(path.stem) and path.name not in done.shards:
                path.unlink()
        shutil.rmtree(self._parts, ignore_errors=True)

    def _begin(self, images: Mapping[str, BucketedImage]) -> None:
        if self._share.is_first:
            if not self._work.skip_existing:
                shutil.rmtree(self._parts, ignore_errors=True)
            _make_folder(self._parts)
            remove_leftovers(self._folder, self._parts, index_beside(self._work.out_json))
        self._share.gathered(None)
        if self._work.skip_existing:
            self._old = dict(self._rows_there())
        missing = [image for key, image in images.items() if key not in self._old]
        require_disk_for_latents(self._folder, missing, self._work.encoding)

    def _rows_there(self) -> Iterator[tuple[str, tuple[Shard, int]]]:
        """Yield the images of shards that are there, those of a manifest or of a preparation that was killed."""
        for path in sorted(self._folder.glob(f"*{SHARD_SUFFIX}")):
            try:
                shard = open_shard(path)
            except UserError as error:
                log.warning("%s", error.problem)
                continue
            if self._dtype == torch.bfloat16 or (shard.places["kinds"][:, 0] == FLOAT32).all():
                yield from ((key, (shard, row)) for row, key in enumerate(shard.keys))

    def _entries(self, images: Mapping[str, BucketedImage]) -> Entries:
        caches = Texts.of(str(cache_path(image.path)) for image in images.values())
        files = Texts.of(str(image.path) for image in images.values())
        masks = Texts.of(str(image.mask or "") for image in images.values())
        return Entries(index_beside(self._work.out_json), self._work.folder, caches, files, masks)

    def _part(self, key: str) -> Path:
        return self._parts / f"{digest([key.encode(errors='surrogatepass')]).hex()}.npz"

    def _encode_share(self, images: Mapping[str, BucketedImage], done: Done) -> tuple[list[str], list[str]]:
        """Encode the images of a shard that this process has to, and that have no latents.

        Return the keys of those that cannot be encoded, and of those whose latents in a shard do not fit.
        """
        own = dealt(images, self._work.encoding.batch_size, self._share)
        failed: list[str] = []
        stale: list[str] = []
        if self._work.skip_existing:
            for key, image in own.items():
                if self._found(key, image, check_image=True, stale=stale) is not None:
                    done.kept.add(key)
        keys_of: dict[BucketedImage, list[str]] = {}  # two entries may have one image
        for key, image in own.items():
            if key not in done.kept:
                keys_of.setdefault(image, []).append(key)
        if not keys_of:
            return failed, stale
        work = self._work
        for outcome in encode_images(list(keys_of), work.vae, work.encoding, vae_digest=work.vae_digest):
            keys = keys_of[outcome.image]
            if outcome.cached is None:
                done.problems.append(str(outcome.error))
                failed += keys
                continue
            for key in keys:
                write_cache(self._part(key), outcome.cached)
            done.written.update(keys)
            report_redone(outcome)
        return failed, stale

    def _found(
        self, key: str, image: BucketedImage, *, check_image: bool, stale: list[str] | None = None
    ) -> CachedLatents | None:
        """Return latents that fit an image: a part, those of a shard, or of a file beside it; None if there are none.

        Those that do not fit are reported, and keys that a shard has in vain are added to `stale`.
        """
        demands = replace(demands_of(image, self._work.encoding, self._work.vae_digest), check_image=check_image)
        part, bucket = self._part(key), image.assignment.bucket
        try:
            if part.is_file():
                return read_fitting(part, image.path, bucket, demands)[0]
        except UserError as error:
            log.warning("%s", error.problem)
        try:
            if key in self._old:
                shard, row = self._old[key]
                return shard.read_fitting(row, image.path, bucket, demands)[0]
        except UserError as error:
            log.warning("%s", error.problem)
            if stale is not None:
                stale.append(key)
        try:
            beside = cache_path(image.path)
            return read_fitting(beside, image.path, bucket, demands)[0] if beside.is_file() else None
        except UserError as error:
            log.warning("%s", error.problem)
        return None

    def _shard_of(
        self,
        images: Mapping[str, BucketedImage],
        entries: Entries,
        rows: Mapping[str, int],
        states: Mapping[str, States],
    ) -> str:
        """Write a shard of images that all have latents, and note them in the index; return its name."""
        present = self._present_shard(images)
        if present is not None:
            return present
        members = []
        for key, image in images.items():
            cached = self._found(key, image, check_image=False)  # they were checked or made just now
            if cached is None:
                raise UserError(f"the latents of '{image.path}' have gone.", "Run again, with --skip_existing.")
            members.append(Member(key, self._as_asked(cached, image)))
        shard = open_shard(write_shard(self._folder, members, self._dtype))
        for row, (key, cached) in enumerate(members):
            entries.note(rows[key], cached, shard.places[row], states[key], is_own=True)
            self._part(key).unlink(missing_ok=True)
        return shard.path.name

    def _present_shard(self, images: Mapping[str, BucketedImage]) -> str | None:
        """Return the name of a shard that holds just these images in this form, without reading them; None if none."""
        first = next(iter(images))
        if first not in self._old or any(self._part(key).is_file() for key in images):
            return None
        shard, _ = self._old[first]
        has_flipped = bool(shard.places["offsets"][0, 1])
        kind = BF16 if self._dtype == torch.bfloat16 else FLOAT32
        is_alike = shard.places["kinds"][0, 0] == kind and has_flipped == self._work.encoding.flip
        is_whole = list(shard.keys) == list(images) and all(self._old.get(key, (None,))[0] is shard for key in images)
        return shard.path.name if is_alike and is_whole else None

    def _as_asked(self, cached: CachedLatents, image: BucketedImage) -> CachedLatents:
        """Return latents without flipped ones and mask that were not asked for, so that all of a shard are alike."""
        if not self._work.encoding.flip:
            cached = replace(cached, latents_flipped=None)
        return cached if image.mask is not None else replace(cached, alpha_mask=None, mask_digest=None)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder '{folder}' ({error.strerror}).", "Check the path.") from error


def _keys_of_shards(images: Mapping[str, BucketedImage]) -> Iterator[list[str]]:
    """Yield the keys of each shard: in order, images of one bucket, all with or all without a mask."""
    groups: dict[tuple[int, int, bool, str | None], list[str]] = {}
    for key in sorted(images):
        image = images[key]
        group = (*image.assignment.bucket, image.mask is not None, image.resize_interpolation)
        groups.setdefault(group, []).append(key)
    for _, keys in sorted(groups.items(), key=lambda group: group[0][:3]):
        for first in range(0, len(keys), ROWS):
            yield keys[first : first + ROWS]
