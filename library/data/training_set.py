"""Metadata, pictures and caches to the list of what is trained on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

from diffusers import AutoencoderKL
from tqdm import tqdm

from library.config.errors import UserError
from library.config.messages import notify
from library.config.options import option
from library.data.buckets import LEGACY_CROP_NOTICE, BucketAssignment, BucketRule, covering_size, parse_resolution
from library.data.images import IMAGE_SUFFIXES, read_size
from library.data.latent_cache import (
    CacheDemands,
    CachedLatents,
    Crop,
    cache_path,
    crop_to_train,
    read_fitting_cache,
    require_separate_caches,
    write_cache,
)
from library.data.latent_preparation import EncodingOptions, Picture, encode_pictures, require_room
from library.data.metadata import (
    ENCODER_G,
    ENCODER_L,
    Entry,
    caption_g,
    caption_l,
    images_by_stem,
    is_file,
    keys_without_caption,
    read_metadata,
    resolve_image,
    train_resolution,
)
from library.sdxl.latents import vae_digest
from library.sdxl.sizes import Size

_NAMES_SHOWN = 10


@dataclass(frozen=True)
class TrainingSetOptions:
    """What is trained on."""

    _argument_group_name: ClassVar[str] = "Training set"

    train_data_dir: Path | None = option(None, "Folder of the pictures and their latents (.npz).")
    in_json: Path | None = option(None, "Metadata: the captions, and the buckets of prepare_buckets_latents.py.")
    resolution: str = option("1024,1024", "Size of training for pictures without prepared latents: width,height.")
    enable_bucket: bool = option(False, "Sort pictures without prepared latents into buckets; else all are cropped.")
    dataset_repeats: int = option(1, "How often an epoch shows each picture.")
    flip_aug: bool = option(False, "Mirror half of the pictures at random.")
    cache_latents: bool = option(
        False, "Encode pictures that have no latents before training, and keep them in memory."
    )
    cache_latents_to_disk: bool = option(False, "Encode them before training and write the .npz files beside them.")
    vae_batch_size: int = option(1, "Pictures that are encoded at once.")
    cache_text_encoder_outputs: bool = option(
        False, "Encode the captions of frozen text encoders before training, each once, and keep that in memory."
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        False, "Encode them before training and write that to the folder text_encoder_outputs among the pictures."
    )
    skip_cache_check: bool = option(False, "Do not read the pictures to see whether their .npz still fits them.")
    legacy_crop_coords: bool = option(
        False, "Use the crop coordinates of kohya's trainers (the wrong axis), to continue a model trained there."
    )

    @property
    def caches_latents(self) -> bool:
        """Whether pictures are encoded before training."""
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def caches_texts(self) -> bool:
        """Whether captions are encoded before training."""
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk

    def problems(self) -> Iterator[str]:
        """What cannot work."""
        if self.train_data_dir is None:
            yield "--train_data_dir is missing: name the folder of the pictures."
        elif not self.train_data_dir.is_dir():
            yield f"--train_data_dir: there is no folder '{self.train_data_dir}'; give the folder of the pictures."
        if self.in_json is None:
            yield "--in_json is missing: name the metadata file, made with the scripts of finetune/."
        elif not self.in_json.is_file():
            yield f"--in_json: there is no file '{self.in_json}'; make it with the scripts of finetune/."
        for flag in ("dataset_repeats", "vae_batch_size"):
            if getattr(self, flag) < 1:
                yield f"--{flag} is {getattr(self, flag)}; it must be 1 or more."
        try:
            parse_resolution(self.resolution)
        except UserError as error:
            yield f"--resolution: {error}"


@dataclass(frozen=True)
class TrainingImage:
    """One picture of the training set.

    `latents` is its cache file, what such a file would hold, or None where `picture` is encoded in the step.
    `bucket` is the size it is trained at, `size` its own.
    """

    key: str
    caption_l: str
    caption_g: str
    size: Size
    bucket: Size
    crop: Crop
    latents: Path | CachedLatents | None
    picture: Picture | None = None


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


def encode_missing(
    images: Sequence[TrainingImage], vae: AutoencoderKL, options: TrainingSetOptions, *, digest: str | None = None
) -> list[TrainingImage]:
    """The images with latents for all, as `--cache_latents` (memory) or `--cache_latents_to_disk` ask.

    `digest` is what the caches say of the VAE (None: its own as it is held). Raises `UserError` for the first picture
    that cannot be encoded.
    """
    pictures = list(dict.fromkeys(image.picture for image in images if image.latents is None and image.picture))
    encoding = EncodingOptions(
        batch_size=options.vae_batch_size, flip_aug=options.flip_aug, legacy_crop_coords=options.legacy_crop_coords
    )
    if options.cache_latents_to_disk:
        assert options.train_data_dir is not None  # checked by problems()
        require_room(options.train_data_dir, pictures, encoding)
    outcomes = encode_pictures(pictures, vae, encoding, vae_digest=digest or vae_digest(vae))
    latents_of: dict[Picture | None, Path | CachedLatents] = {}
    for outcome in tqdm(
        outcomes, "encoding latents", len(pictures), unit="picture", disable=None if pictures else True
    ):
        if outcome.error is not None:
            raise outcome.error
        if outcome.redone_in_float32:
            notify(f"'{outcome.picture.path}' gave NaN in the VAE's precision and was encoded in float32.")
        assert outcome.cached is not None
        latents: Path | CachedLatents = outcome.cached
        if options.cache_latents_to_disk:
            latents = cache_path(outcome.picture.path)
            write_cache(latents, outcome.cached)
        latents_of[outcome.picture] = latents
    return [replace(image, latents=latents_of.get(image.picture, image.latents)) for image in images]


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
        picture=Picture(image, size, assignment),
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
    for encoder in (ENCODER_L, ENCODER_G):
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
