"""Latents of images into files: those that fit are kept, the rest is encoded; and what became of the images."""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from library.config.errors import UserError
from library.config.processes import Share
from library.data.latent_cache import CacheDemands, read_fitting
from library.data.latent_preparation import Encoding, Outcome, batches_of, encode_images, require_disk_for_latents
from library.data.latent_writing import IndexedFiles, Place
from library.images.buckets import BucketedImage
from library.images.reading import UnusableImage
from library.sdxl.latents import vae_digest
from library.sdxl.model_source import load_vae

log = logging.getLogger(__name__)

_MOST_NAMES = 10
_MOST_CROPPED = 3
_WORTH_NAMING = 0.05  # of an image


@dataclass(frozen=True)
class Work:
    """What the images of `folder` are prepared for: the metadata file to write, how they are encoded, and by whom."""

    out_json: Path
    folder: Path
    vae: AutoencoderKL
    vae_digest: str
    encoding: Encoding
    share: Share
    skip_existing: bool


@dataclass
class Done:
    """The keys of images that had latents, and of those encoded now; the problems of others; the names of shards."""

    kept: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)


def joined(parts: Sequence[Done]) -> Done:
    """Return what all processes have done."""
    all_of = Done()
    for part in parts:
        all_of.kept |= part.kept
        all_of.written |= part.written
        all_of.problems += part.problems
        all_of.shards += part.shards
    return all_of


def vae_to_encode(model: str, dtype: str) -> tuple[AutoencoderKL, str]:
    """Return the VAE of a model, on the GPU if there is one, in the torch dtype of that name, and its digest."""
    vae = load_vae(model, None)
    digest = vae_digest(vae)  # before it is narrowed to the requested precision
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    # Not diffusers' own `to`, which warns of every change of precision.
    torch.nn.Module.to(vae, device, getattr(torch, dtype))
    return vae, digest


def write_latents(
    vae: AutoencoderKL,
    digest: str,
    groups: Mapping[Encoding, Mapping[BucketedImage, Place]],
    present: Mapping[BucketedImage, Path],
    problems: list[str],
    share: Share = Share(),  # noqa: B008  (a value)
) -> tuple[set[BucketedImage], set[BucketedImage]]:
    """Write the latents of every image to its file; return the images whose latents are kept, and those written.

    `groups` holds the images that are encoded alike, each with the file to write and the index that has its entry. The
    files of `present` are kept where they were made from this image, VAE and bucket. What cannot be encoded is added to
    `problems`. These are the images of this process; the others of `share` have theirs.
    """
    files = IndexedFiles({image: place for places in groups.values() for image, place in places.items()})
    try:
        kept = set(_still_fitting(groups, present, digest, files))
        to_encode = {encoding: [image for image in places if image not in kept] for encoding, places in groups.items()}
        _require_disk(to_encode)
        outcomes = chain.from_iterable(
            encode_images(images, vae, encoding, vae_digest=digest) for encoding, images in to_encode.items() if images
        )
        total = sum(map(len, to_encode.values()))
        written = set(_written(tqdm(outcomes, "encoding", total, unit="image"), files, problems))
    except BaseException:
        files.save_index()  # nobody waits for this process any more
        raise
    share.in_turn(files.save_index)
    return kept, written


def problem_of(path: Path, error: UserError) -> str:
    """Return the sentence on an image that cannot be used, with its name."""
    return str(error) if isinstance(error, UnusableImage) else f"'{path}': {error}"


def _require_disk(to_encode: Mapping[Encoding, Iterable[BucketedImage]]) -> None:
    """Raise `UserError` unless every disk has room for the latents of its images."""
    for encoding, images in to_encode.items():
        of_disk: dict[int, list[BucketedImage]] = defaultdict(list)
        device = {folder: os.stat(folder).st_dev for folder in {image.path.parent for image in images}}  # noqa: PTH116
        for image in images:
            of_disk[device[image.path.parent]].append(image)
        for members in of_disk.values():
            require_disk_for_latents(members[0].path.parent, members, encoding)


def _still_fitting(
    groups: Mapping[Encoding, Mapping[BucketedImage, Place]],
    present: Mapping[BucketedImage, Path],
    digest: str,
    files: IndexedFiles,
) -> Iterator[BucketedImage]:
    """Yield the images whose files of `present` fit; those in their places are noted in `files`."""
    to_check = [
        (image, place.file, encoding)
        for encoding, places in groups.items()
        for image, place in places.items()
        if image in present
    ]
    for image, own, encoding in tqdm(to_check, "checking latents", unit="image", disable=not to_check):
        path, demands = present[image], demands_of(image, encoding, digest)
        if not path.is_file():
            continue
        try:
            cached, place = read_fitting(path, image.path, image.assignment.bucket, demands)
            if path == own:
                files.keep(image, cached, place)
            yield image
        except UserError as error:
            log.warning("%s It is encoded again.", error.problem)


def demands_of(image: BucketedImage, encoding: Encoding, digest: str) -> CacheDemands:
    """Return what latents that are there must agree with to be kept."""
    return CacheDemands(
        vae_digest=digest,
        flip=encoding.flip,
        mask=image.mask,
        legacy_crop=encoding.legacy_crop,
        only_ours=True,
        resize_interpolation=image.resize_interpolation,
    )


def dealt(images: Mapping[str, BucketedImage], batch_size: int, share: Share) -> dict[str, BucketedImage]:
    """Return the images that one process encodes: whole batches are dealt out in turn, as one process would form them.

    The processes need not agree on what is there already.
    """
    batches = batches_of(images, lambda key: images[key].assignment.bucket, batch_size)
    return {key: images[key] for number, batch in enumerate(batches) if share.has(number) for key in batch}


def report_redone(outcome: Outcome) -> None:
    """Report an image that was encoded in float32."""
    if outcome.redone_in_float32:
        log.warning("'%s' gave NaN or Inf in the VAE's precision and was encoded in float32.", outcome.image.path)


def _written(outcomes: Iterable[Outcome], files: IndexedFiles, problems: list[str]) -> Iterator[BucketedImage]:
    for outcome in outcomes:
        if outcome.cached is None:
            problems.append(str(outcome.error))
            continue
        files.write(outcome.image, outcome.cached)
        yield outcome.image
        report_redone(outcome)


def _about_crops(images: Collection[BucketedImage]) -> str:
    """Return how much of the images is cropped away, and of which the most."""
    if not images:
        return ""
    lost = [(1 - each.assignment.bucket.area / each.assignment.resized.area, each.path.name) for each in images]
    mean = sum(share for share, _ in lost) / len(lost)
    most = sorted(lost, reverse=True)[:_MOST_CROPPED]
    shown = ", ".join(f"'{name}' {share * 100:.0f} %" for share, name in most if share >= _WORTH_NAMING)
    return f"; about {mean * 100:.0f} % of each image is cropped away" + (f"; most: {shown}" if shown else "")


def report_buckets(images: Collection[BucketedImage], num_kept: int) -> None:
    """Report the buckets of the images that have latents, `num_kept` of which had them before."""
    assignments = [image.assignment for image in images]
    lines = ["  bucket       images"]
    for bucket, count in sorted(Counter(assignment.bucket for assignment in assignments).items()):
        lines.append(f"  {bucket!s:<11}  {count:>6}")
    log.info("%s", "\n".join(["buckets:", *lines]))
    log.info("%d images (%d had their latents)%s", len(assignments), num_kept, _about_crops(images))


def report_names(what: str, names: Iterable[str]) -> None:
    """Report how many names there are, `what` they are, and ten of them at most; nothing if there is none."""
    names = sorted(names)
    if names:
        more = [f"and {len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else []
        log.info("%s", "\n  ".join([f"{len(names)} {what}:", *names[:_MOST_NAMES], *more]))
