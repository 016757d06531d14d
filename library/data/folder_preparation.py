"""A folder of images prepared for training: a bucket and latents for each, and a report of what became of them."""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from library.config.errors import UserError, listed
from library.config.leftovers import remove_leftovers
from library.data.buckets import BucketedImage, BucketRule
from library.data.cache_files import require_separate_caches
from library.data.crops import LEGACY_CROP_NOTICE
from library.data.image_files import find_images
from library.data.image_keys import images_of_keys, keys_of_images, same_path
from library.data.images import UnusableImage, read_size
from library.data.latent_cache import CacheDemands, cache_path, read_fitting_cache, write_cache
from library.data.latent_preparation import Encoding, Outcome, encode_images, require_disk_for_latents
from library.data.metadata import Metadata, read_metadata, with_train_resolution, write_metadata
from library.data.metadata_lines import is_lines
from library.sdxl.latents import vae_digest
from library.sdxl.model_source import load_vae

log = logging.getLogger(__name__)

_MOST_NAMES = 10
_MOST_CROPPED = 3
_WORTH_NAMING = 0.05  # of an image


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
) -> int:
    """Write latents beside the images of `folder` and their buckets into `out_json`; return how many images failed.

    `vae_dtype` is the name of torch's dtype. Raise `UserError` if nothing can be prepared at all.
    """
    metadata = read_metadata(in_json)
    path_of = _images_with_metadata(folder, in_json, metadata, full_path=full_path, recursive=recursive)
    _report_missing(metadata, path_of, remove_missing=remove_missing)
    remove_leftovers(out_json.parent, *(path.parent for path in path_of.values()))
    if encoding.legacy_crop:
        log.warning(LEGACY_CROP_NOTICE)
    vae = load_vae(model, None)
    digest = vae_digest(vae)  # before it is narrowed to the requested precision
    # Not diffusers' own `to`, which warns of every change of precision.
    torch.nn.Module.to(vae, "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, vae_dtype))

    problems: list[str] = []
    images = dict(_assign(path_of, rule, resize_interpolation, problems))
    kept = set(_still_fitting(images.values(), encoding, digest)) if skip_existing else set()
    to_encode = [image for image in images.values() if image not in kept]
    require_disk_for_latents(folder, to_encode, encoding)
    outcomes = encode_images(to_encode, vae, encoding, vae_digest=digest)
    written = set(_write_latents(tqdm(outcomes, "encoding", len(to_encode), unit="image"), problems))

    prepared = {key: image for key, image in images.items() if image in kept | written}
    for key, image in prepared.items():
        metadata[key] = with_train_resolution(metadata[key], image.assignment.bucket)
    write_metadata(out_json, metadata)
    log.info("wrote %d entries, %d of them with latents, to '%s'", len(metadata), len(prepared), out_json)
    _report_buckets(prepared.values(), num_kept=len(kept))
    _report_names("images could not be used", problems)
    return len(problems)


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
    _report_names(
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
    _report_names(f"keys are paths of another place; their images were found by name in '{folder}'", moved)
    return moved


def _report_missing(metadata: Metadata, known: dict[str, Path], *, remove_missing: bool) -> None:
    """Report the entries without an image, and remove them if asked to."""
    missing = sorted(metadata.keys() - known.keys())
    if not remove_missing:
        _report_names("entries of the metadata without an image stay as they are (see --remove_missing)", missing)
        return
    for key in missing:
        del metadata[key]
    _report_names("entries without an image are removed", missing)


def _assign(
    path_of: dict[str, Path], rule: BucketRule, resize_interpolation: str | None, problems: list[str]
) -> Iterator[tuple[str, BucketedImage]]:
    for key, path in path_of.items():
        try:
            size = read_size(path)
            yield key, BucketedImage(path, size, rule.assign(size), resize_interpolation)
        except UnusableImage as error:
            problems.append(str(error))
        except UserError as error:
            problems.append(f"'{path}': {error}")


def _still_fitting(images: Iterable[BucketedImage], encoding: Encoding, digest: str) -> Iterator[BucketedImage]:
    for image in tqdm(images, "checking latents", unit="image"):
        demands = CacheDemands(
            vae_digest=digest,
            flip=encoding.flip,
            alpha_mask=encoding.alpha_mask,
            legacy_crop=encoding.legacy_crop,
            only_ours=True,
            resize_interpolation=image.resize_interpolation,
        )
        path = cache_path(image.path)
        if not path.is_file():
            continue
        try:
            read_fitting_cache(path, image.path, image.assignment.bucket, demands)
            yield image
        except UserError as error:
            log.warning("%s It is encoded again.", error.problem)


def _write_latents(outcomes: Iterable[Outcome], problems: list[str]) -> Iterator[BucketedImage]:
    for outcome in outcomes:
        if outcome.cached is None:
            problems.append(str(outcome.error))
            continue
        write_cache(cache_path(outcome.image.path), outcome.cached)
        yield outcome.image
        if outcome.redone_in_float32:
            log.warning("'%s' gave NaN or Inf in the VAE's precision and was encoded in float32.", outcome.image.path)


def _about_crops(images: Collection[BucketedImage]) -> str:
    """Return how much of the images is cropped away, and of which the most."""
    if not images:
        return ""
    lost = [(1 - each.assignment.bucket.area / each.assignment.resized.area, each.path.name) for each in images]
    mean = sum(share for share, _ in lost) / len(lost)
    most = sorted(lost, reverse=True)[:_MOST_CROPPED]
    shown = ", ".join(f"'{name}' {share * 100:.0f} %" for share, name in most if share >= _WORTH_NAMING)
    return f"; about {mean * 100:.0f} % of each image is cropped away" + (f"; most: {shown}" if shown else "")


def _report_buckets(images: Collection[BucketedImage], num_kept: int) -> None:
    assignments = [image.assignment for image in images]
    lines = ["  bucket       images"]
    for bucket, count in sorted(Counter(assignment.bucket for assignment in assignments).items()):
        lines.append(f"  {bucket!s:<11}  {count:>6}")
    log.info("%s", "\n".join(["buckets:", *lines]))
    log.info("%d images (%d had their latents)%s", len(assignments), num_kept, _about_crops(images))


def _report_names(what: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        more = [f"and {len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else []
        log.info("%s", "\n  ".join([f"{len(names)} {what}:", *names[:_MOST_NAMES], *more]))
