"""Metadata, pictures and caches to the list of what is trained on."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from library.config.errors import UserError
from library.config.messages import notify
from library.data.buckets import BucketAssignment, BucketedImage, BucketRule, covering_size
from library.data.crops import LEGACY_CROP_NOTICE, Crop, crop_to_train
from library.data.image_keys import images_by_stem, is_file, resolve_image
from library.data.images import IMAGE_SUFFIXES, read_size
from library.data.latent_cache import (
    CacheDemands,
    CachedLatents,
    cache_path,
    read_fitting_cache,
    require_separate_caches,
)
from library.data.metadata import (
    COLUMN_G,
    COLUMN_L,
    Entry,
    caption_g,
    caption_l,
    keys_without_caption,
    read_metadata,
    train_resolution,
)
from library.data.subsets import TrainingSetOptions
from library.sdxl.sizes import Size

_NAMES_SHOWN = 10


@dataclass(frozen=True)
class TrainingImage:
    """One picture of the training set.

    `latents` is its cache file, what such a file would hold, or None where `source` is encoded in the step.
    `bucket` is the size it is trained at, `size` its own.
    """

    key: str
    caption_l: str
    caption_g: str
    size: Size
    bucket: Size
    crop: Crop
    latents: Path | CachedLatents | None
    source: BucketedImage | None = None


class _Found(NamedTuple):
    """An image of the metadata: its picture, None where there is none, and where its cache is or would be."""

    key: str
    entry: Entry
    picture: Path | None
    cache: Path


def require_images(options: TrainingSetOptions) -> None:
    """Raise the `UserError` of `read_training_set` that needs no model: for metadata, captions and missing images."""
    _find_images(options)


def read_training_set(options: TrainingSetOptions, rule: BucketRule, digest: str) -> list[TrainingImage]:
    """Every image of the metadata, with its cache where that fits the picture, the VAE (of `digest`) and the bucket.

    Caches that no longer fit are named on stderr and made again. Raises `UserError` naming every image that lacks a
    caption, and every one that has neither picture nor cache.
    """
    if options.legacy_crop_coords:
        notify(LEGACY_CROP_NOTICE)
    demands = CacheDemands(digest, flip=options.flip_aug, check_image=not options.skip_cache_check)
    images: list[TrainingImage] = []
    for found in tqdm(_find_images(options), desc="reading the training set", unit="picture", disable=None):
        cached = _read_if_fitting(found.cache, found.picture, train_resolution(found.entry), demands)
        if cached is not None:
            images.append(_from_cache(found.key, found.entry, found.cache, cached, options))
        else:
            assert found.picture is not None  # or its cache would have been used, or refused
            images.append(_from_picture(found.key, found.entry, found.picture, rule, options))
    return images


def _find_images(options: TrainingSetOptions) -> list[_Found]:
    assert options.in_json is not None and options.train_data_dir is not None  # checked by problems()
    metadata = read_metadata(options.in_json)
    if not metadata:
        raise UserError(f"'{options.in_json}' has no images.", "Make it with the scripts of finetune/.")
    _require_captions(metadata, options.in_json)
    folder = options.train_data_dir
    by_stem = images_by_stem(folder)
    picture_of = {key: resolve_image(key, folder, by_stem) for key in metadata}
    require_separate_caches(path for path in picture_of.values() if path is not None)
    found = [
        _Found(key, entry, picture, _cache_without_picture(key, folder) if picture is None else cache_path(picture))
        for (key, entry), picture in zip(metadata.items(), picture_of.values(), strict=True)
    ]
    missing = [each.key for each in found if each.picture is None and not is_file(each.cache)]
    if missing:
        raise UserError(
            f"{len(missing)} images of '{options.in_json}' are not in '{folder}': {_some(missing)}.",
            "Check --train_data_dir, or take them out of the metadata.",
        )
    return found


def _read_if_fitting(
    cache: Path, picture: Path | None, bucket: Size | None, demands: CacheDemands
) -> CachedLatents | None:
    """What the cache file holds; None if there is none, or (with a notice) if it does not fit the picture beside it."""
    if not is_file(cache):
        return None
    try:
        return read_fitting_cache(cache, picture, bucket, demands)
    except UserError as error:
        if picture is None:
            raise
        notify(f"{error.problem} It is encoded again.")
        return None


def _from_cache(
    key: str, entry: Entry, path: Path, cached: CachedLatents, options: TrainingSetOptions
) -> TrainingImage:
    return TrainingImage(
        key=key,
        caption_l=caption_l(entry) or "",
        caption_g=caption_g(entry) or "",
        size=cached.original_size,
        bucket=cached.bucket,
        crop=cached.crop(legacy=options.legacy_crop_coords),
        latents=path,
    )


def _from_picture(key: str, entry: Entry, image: Path, rule: BucketRule, options: TrainingSetOptions) -> TrainingImage:
    """The image without latents: in the bucket that the metadata names, or else that the rule gives it."""
    size = read_size(image)
    prepared = train_resolution(entry)
    if prepared is None:
        assignment = rule.assign(size)
    else:
        assignment = BucketAssignment(prepared, covering_size(prepared, size), prepared.aspect - size.aspect)
    bucket, resized, _ = assignment
    return TrainingImage(
        key=key,
        caption_l=caption_l(entry) or "",
        caption_g=caption_g(entry) or "",
        size=size,
        bucket=bucket,
        crop=crop_to_train(bucket, resized, size, legacy=options.legacy_crop_coords),
        latents=None,
        source=BucketedImage(image, size, assignment),
    )


def _cache_without_picture(key: str, folder: Path) -> Path:
    """Where the cache of an image lies whose picture is not there (only the latents were copied to this machine).

    A key that is a path may have been written on another machine: then the file name alone is looked for as well.
    """
    path = Path(key.replace("\\", "/"))
    name = path.with_suffix(".npz") if path.suffix.lower() in IMAGE_SUFFIXES else Path(f"{path}.npz")
    if ".." in name.parts:  # nothing that lies outside may be read
        name = Path(name.name)
    candidates = [folder / name, name, folder / name.name] if len(name.parts) > 1 else [folder / name]
    return next((candidate for candidate in candidates if is_file(candidate)), candidates[0])


def _require_captions(metadata: dict[str, Entry], path: Path) -> None:
    for encoder in (COLUMN_L, COLUMN_G):
        lacking = keys_without_caption(metadata, encoder)
        if lacking:
            script = f"sdxl_merge_captions_{encoder.letter.lower()}_to_metadata.py"
            raise UserError(
                f"'{path}': {len(lacking)} images have no {encoder.letter} caption: {_some(lacking)}.",
                f"Write their caption files (which may be empty), run finetune/{script} and the preparation again, "
                "or take these images out of the metadata.",
            )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
