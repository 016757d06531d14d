"""A folder of images prepared for training: a bucket and latents for each, and a report of what became of them."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from library.config.errors import UserError, listed
from library.config.leftovers import remove_leftovers
from library.config.processes import share_of_process
from library.data.cache_files import require_separate_caches
from library.data.caption_sources import was_edited
from library.data.latent_cache import cache_path
from library.data.latent_files import (
    Done,
    Work,
    dealt,
    joined,
    problem_of,
    report_buckets,
    report_names,
    vae_to_encode,
    write_latents,
)
from library.data.latent_index import index_beside
from library.data.latent_preparation import Encoding
from library.data.latent_shards import shards_path
from library.data.latent_writing import Place
from library.data.mask_files import masks_of
from library.data.metadata import (
    COLUMN_G,
    COLUMN_L,
    TRAIN_RESOLUTION,
    Metadata,
    entries_in,
    is_reg,
    read_metadata,
    with_train_resolution,
    write_metadata,
)
from library.data.metadata_lines import is_lines
from library.data.shard_preparation import prepare_shards
from library.images.buckets import BucketedImage, BucketRule, MaskSource
from library.images.crops import LEGACY_CROP_NOTICE
from library.images.files import find_images
from library.images.keys import images_of_keys, keys_of_images, same_path
from library.images.reading import read_size

log = logging.getLogger(__name__)

_MADE = frozenset({TRAIN_RESOLUTION, *(column.source_key for column in (COLUMN_L, COLUMN_G))})
"""What scripts write into entries; it is made again."""


def prepare_folder(
    folder: Path,
    in_json: Path,
    out_json: Path,
    model: str,
    rule: BucketRule,
    encoding: Encoding,
    vae_dtype: str,
    *,
    full_path: bool,
    recursive: bool,
    skip_existing: bool,
    remove_missing: bool = False,
    resize_interpolation: str | None = None,
    alpha_mask: bool = False,
    mask_dir: Path | None = None,
    shards_in: str | None = None,
) -> int:
    """Write latents beside the images of `folder` and their buckets into `out_json`; return how many images failed.

    With `shards_in` (the name of a torch dtype, as `vae_dtype`) they are written into shards beside `out_json`. Several
    processes share the images. Masks of `mask_dir`, or else with `alpha_mask` the alpha channels, are kept with the
    latents. Raise `UserError` if nothing can be prepared at all.
    """
    metadata = read_metadata(in_json)
    path_of = _images_with_metadata(folder, in_json, metadata, full_path=full_path, recursive=recursive)
    _report_missing(metadata, path_of, remove_missing=remove_missing)
    if share_of_process().is_first and out_json.is_file() and not out_json.samefile(in_json):
        _warn_of_edits(out_json, in_json, metadata)
    regular = {key for key in path_of if is_reg(metadata[key])}
    masks = masks_of(path_of, folder, mask_dir, alpha_mask=alpha_mask, need_none=regular)
    remove_leftovers(out_json.parent, *(path.parent for path in path_of.values()))
    if encoding.legacy_crop:
        log.warning(LEGACY_CROP_NOTICE)
    vae, digest = vae_to_encode(model, vae_dtype)
    problems: list[str] = []
    images = dict(_assign(path_of, masks, rule, resize_interpolation, problems))
    work = Work(out_json, folder, vae, digest, encoding, share_of_process(), skip_existing)
    done = _latents_beside(images, work) if shards_in is None else prepare_shards(images, work, shards_in)
    problems += done.problems
    prepared = {key: image for key, image in images.items() if key in done.kept or key in done.written}
    if not work.share.is_first:
        return len(problems)
    for key, image in prepared.items():
        metadata[key] = with_train_resolution(metadata[key], image.assignment.bucket)
    write_metadata(out_json, metadata)
    log.info("wrote %d entries, %d of them with latents, to '%s'", len(metadata), len(prepared), out_json)
    report_buckets(prepared.values(), num_kept=len(done.kept))
    report_names("images could not be used", problems)
    return len(problems)


def _warn_of_edits(out_json: Path, in_json: Path, metadata: Metadata) -> None:
    """Name the entries of an earlier output that were edited there, and differ from those of the input.

    A caption that is as it was read from its file was not edited.
    """
    edited = []
    try:
        for _, key, earlier in entries_in(out_json):
            entry = metadata.get(key, {})
            names = {name for name, value in earlier.items() if name not in _MADE and entry.get(name) != value}
            for column in (COLUMN_L, COLUMN_G):
                if column.source_key in earlier and not was_edited(earlier, column):
                    names.discard(column.metadata_key)
            if names:
                edited.append(f"'{key}' ({', '.join(sorted(names))})")
    except UserError as error:
        log.warning("an earlier output that cannot be read is replaced: %s", error)
    if edited:
        log.warning(
            "%d entries were edited in '%s' and are replaced by those of '%s': %s",
            len(edited),
            out_json,
            in_json,
            listed(edited),
        )


def _latents_beside(images: Mapping[str, BucketedImage], work: Work) -> Done:
    """Write the latents of images beside them; return what became of those of all processes."""
    if shards_path(work.out_json).exists():
        log.warning(
            "training reads the shards in '%s' first: delete them, or pass --latents_as=shards.",
            shards_path(work.out_json),
        )
    own = dealt(images, work.encoding.batch_size, work.share)
    cache_of = {image: cache_path(image.path) for image in own.values()}
    places = {image: Place(file, index_beside(work.out_json), work.folder) for image, file in cache_of.items()}
    done = Done()
    kept, written = write_latents(
        *(work.vae, work.vae_digest, {work.encoding: places}, cache_of if work.skip_existing else {}, done.problems),
        share=work.share,
    )
    done.kept.update(key for key, image in own.items() if image in kept)
    done.written.update(key for key, image in own.items() if image in written)
    return joined(work.share.gathered(done))


def _images_with_metadata(
    folder: Path, in_json: Path, metadata: Metadata, *, full_path: bool, recursive: bool
) -> dict[str, Path]:
    """Return the images to prepare by their keys; report what has no counterpart on the other side."""
    images = find_images(folder, recursive=recursive)
    if is_lines(in_json):  # whose keys are paths
        known = images_of_keys(metadata, folder)
    else:
        path_of = keys_of_images(images, full_path=full_path)
        known = {key: path for key, path in path_of.items() if key in metadata}
        if full_path:
            known |= _moved_images(metadata, known, images, folder)
    with_entry = {same_path(path) for path in known.values()}
    report_names(
        "images without metadata are left out", [str(path) for path in images if same_path(path) not in with_entry]
    )
    if not known:
        raise UserError(
            f"no image of '{folder}' has an entry in '{in_json}'.",
            "Check both paths, and that --full_path and --recursive are as they were for the merge scripts.",
        )
    require_separate_caches(known.values())
    return known


def _moved_images(metadata: Metadata, known: dict[str, Path], images: list[Path], folder: Path) -> dict[str, Path]:
    """Return the images whose keys are paths of another place, found by name as the trainer does, and report them."""
    taken = {same_path(path) for path in known.values()}
    free = {same_path(path): path for path in images if same_path(path) not in taken}
    found = images_of_keys(metadata.keys() - known.keys(), folder) if free else {}
    moved = {key: free[same_path(path)] for key, path in sorted(found.items()) if same_path(path) in free}
    if len({same_path(path) for path in moved.values()}) < len(moved):
        raise UserError(
            f"several keys of the metadata lead to one image of '{folder}': {listed(sorted(moved))}.",
            "Remove those of other folders from the metadata.",
        )
    report_names(f"keys are paths of another place; their images were found by name in '{folder}'", moved)
    return moved


def _report_missing(metadata: Metadata, known: dict[str, Path], *, remove_missing: bool) -> None:
    """Report the entries without an image, and remove them if asked to."""
    missing = sorted(metadata.keys() - known.keys())
    if not remove_missing:
        report_names("entries of the metadata without an image stay as they are (see --remove_missing)", missing)
        return
    for key in missing:
        del metadata[key]
    report_names("entries without an image are removed", missing)


def _assign(
    path_of: Mapping[str, Path],
    masks: Mapping[str, MaskSource | None],
    rule: BucketRule,
    resize_interpolation: str | None,
    problems: list[str],
) -> Iterator[tuple[str, BucketedImage]]:
    for key, path in path_of.items():
        try:
            size = read_size(path)
            yield key, BucketedImage(path, size, rule.assign(size), resize_interpolation, masks[key])
        except UserError as error:
            problems.append(problem_of(path, error))
