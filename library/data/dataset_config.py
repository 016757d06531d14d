"""A data set file (TOML or JSON, in the schema of kohya's trainers) to the subsets that it describes."""

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from library.captions.options import CaptionOptions, caption_extension, resolve, rule_problems
from library.config.errors import UserError, error_of_problems
from library.data.dataset_schema import WITHOUT_EFFECT, converted, read_tables
from library.data.loader_options import LoaderOptions
from library.data.subsets import Subset
from library.data.training_set_options import ONE_CAPTION_FILE, TrainingSetOptions
from library.data.validation_options import ValidationOptions
from library.images.augmentation import Augmentation, interpolation_of, parse_face_range
from library.images.buckets import BucketOptions, parse_resolution
from library.sdxl.sizes import Size

log = logging.getLogger(__name__)

Level = Mapping[str, Any]

AUGMENTATION_KEYS = ("flip_aug", "color_aug", "random_crop", "face_crop_aug_range", "resize_interpolation")


def read_dataset_config(
    path: Path,
    training_set: TrainingSetOptions,
    loader: LoaderOptions,
    captions: CaptionOptions,
    buckets: BucketOptions,
    validation: ValidationOptions = ValidationOptions(),  # noqa: B008 (a value)
) -> list[Subset]:
    """Return the subsets of a data set file.

    What a subset leaves out its data set says, or else `[general]`, or else the command line. Raise `UserError` that
    lists what cannot work: unknown keys, wrong values, folders that do not exist or are named twice in a data set.
    """
    tables = read_tables(path)
    flags = _level_of_flags(training_set, loader, captions, buckets, validation)
    subsets: list[Subset] = []
    problems: list[str] = []
    for number, (dataset, members) in enumerate(tables.datasets):
        for member in members:
            levels = [_converted(level) for level in (member, dataset, tables.general)] + [flags]
            try:
                subsets.append(_subset(path, number, levels, training_set))
            except UserError as error:
                problems.append(f"'{path}': {error}")
                continue
            own = [*rule_problems(subsets[-1].captions), *training_set.crop_problems(subsets[-1].augmentation)]
            problems += [f"'{path}': {problem}" for problem in own]
    if any(subset.mask_dir is not None for subset in subsets) and not training_set.masked_loss:
        problems.append(f"'{path}': conditioning_data_dir has no effect without --masked_loss; add it.")
    if training_set.one_caption and any(subset.reads_folder for subset in subsets):
        problems.append(f"'{path}': --one_caption needs a metadata_file in every subset: {ONE_CAPTION_FILE}")
    of_all = [*_folder_problems(subsets), *training_set.cache_problems([subset.augmentation for subset in subsets])]
    problems += [f"'{path}': {problem}" for problem in of_all]
    if problems:
        raise error_of_problems(list(dict.fromkeys(problems)))
    said = {
        key for dataset, members in tables.datasets for level in (tables.general, dataset, *members) for key in level
    }
    for key in WITHOUT_EFFECT:
        if key in said:
            log.info("'%s': %s has no effect: %s", path, key, WITHOUT_EFFECT[key])
    for subset in subsets if training_set.caches_latents else []:
        if subset.augmentation.changes_pixels:
            names = " and ".join(subset.augmentation.of_pixels)
            log.info("'%s': images of '%s' are encoded in every step, because of %s", path, subset.image_dir, names)
    return _with_names_of_caches(subsets)


def require_masks(training_set: TrainingSetOptions, subsets: Sequence[Subset]) -> list[Subset]:
    """Return the subsets of a data set file. Raise `UserError` if masks are asked for and none of them has any."""
    if training_set.masked_loss and not any(subset.has_masks for subset in subsets):
        raise UserError(
            f"--masked_loss: no subset of '{training_set.dataset_config}' has masks.",
            "Name their folder there (conditioning_data_dir), or use the transparency of images (alpha_mask = true).",
        )
    return list(subsets)


def _level_of_flags(
    training_set: TrainingSetOptions,
    loader: LoaderOptions,
    captions: CaptionOptions,
    buckets: BucketOptions,
    validation: ValidationOptions,
) -> dict[str, Any]:
    return {
        **vars(captions),
        **vars(buckets),
        "batch_size": loader.train_batch_size,
        "num_repeats": training_set.dataset_repeats,
        "resolution": training_set.resolution,
        "enable_bucket": training_set.enable_bucket,
        **{name: getattr(training_set, name) for name in AUGMENTATION_KEYS},
        "alpha_mask": training_set.alpha_mask,
        "cache_info": training_set.cache_info,
        "validation_split": validation.validation_split,
        "validation_seed": validation.validation_seed,
    }


def _converted(level: Level) -> dict[str, Any]:
    return {key: converted(key, value) for key, value in level.items()}


def _subset(path: Path, dataset: int, levels: Sequence[Level], training_set: TrainingSetOptions) -> Subset:
    def decided(name: str, default: Any = None) -> Any:
        return next((level[name] for level in levels if level.get(name) is not None), default)

    metadata, folder = decided("metadata_file"), decided("image_dir")
    if metadata is None and folder is None:
        raise UserError("a subset has no image_dir.", "Name the folder of its images.")
    metadata_file = None if metadata is None else _located(path, metadata)
    resolution = decided("resolution")
    sides = resolution if isinstance(resolution, list) else [resolution]
    buckets = BucketOptions(
        **{
            name: decided(name)
            for name in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")
        }
    )
    face_range = decided("face_crop_aug_range")
    rule = buckets.rule(parse_resolution(",".join(map(str, sides))), enabled=decided("enable_bucket"))
    subset = Subset(
        image_dir=metadata_file.parent if folder is None and metadata_file else _located(path, folder),
        metadata_file=metadata_file,
        rule=rule,
        dataset=dataset,
        batch_size=decided("batch_size"),
        num_repeats=decided("num_repeats"),
        captions=resolve(levels),
        extension_l=caption_extension(levels, "l"),
        extension_g=caption_extension(levels, "g"),
        one_caption=training_set.one_caption,
        augmentation=Augmentation(
            flip_aug=decided("flip_aug"),
            color_aug=decided("color_aug"),
            random_crop=decided("random_crop"),
            face_crop_aug_range=None if face_range is None else _face_range(face_range),
            resize_interpolation=interpolation_of(decided("resize_interpolation")),
        ),
        alpha_mask=decided("alpha_mask"),
        mask_dir=None if (masks := decided("conditioning_data_dir")) is None else _located(path, masks),
        loss_weight=float(decided("loss_weight", 1.0)),
        class_tokens=decided("class_tokens"),
        is_of_file=True,
        prior_loss_weight=training_set.prior_loss_weight,
        cache_info=decided("cache_info"),
        key_prefix=_key_prefix(folder, metadata, rule.max_resolution, training_set),
        validation_split=decided("validation_split"),
        validation_seed=int(decided("validation_seed")),
    )
    return subset.as_regularization() if decided("is_reg", False) else subset


def _key_prefix(folder: str | None, metadata: str | None, resolution: Size, training_set: TrainingSetOptions) -> str:
    """Return what tells the images of a subset from those of others, whichever these are.

    That is the folder as it is written, and the resolution if it is not that of the command line.
    """
    written = folder if metadata is None or folder is not None else os.path.dirname(metadata)  # noqa: PTH120  # as text
    place = os.path.normpath(written or ".").replace("\\", "/")
    size = "" if resolution == parse_resolution(training_set.resolution) else f"{resolution} "
    return f"{size}{place}/" if place != "." else size


def _face_range(said: str | Sequence[float]) -> tuple[float, float]:
    return parse_face_range(said if isinstance(said, str) else ",".join(map(str, said)))


def _located(config: Path, name: str) -> Path:
    """Return a path as it is seen from the current folder, or if nothing is there, from the data set file."""
    path = Path(name)
    beside = config.parent / path
    return beside if not path.exists() and beside.exists() else path


def _folder_problems(subsets: Sequence[Subset]) -> Iterator[str]:
    named: dict[tuple[int, Path], int] = defaultdict(int)
    for subset in subsets:
        if not subset.image_dir.is_dir():
            yield f"image_dir: there is no folder '{subset.image_dir}'."
        if subset.mask_dir is not None and not subset.mask_dir.is_dir():
            yield f"conditioning_data_dir: there is no folder '{subset.mask_dir}'."
        if subset.metadata_file is not None and not subset.metadata_file.is_file():
            yield f"metadata_file: there is no file '{subset.metadata_file}'."
        named[subset.dataset, (subset.metadata_file or subset.image_dir).resolve()] += 1
    for (dataset, path), number in named.items():
        if number > 1:
            yield f"number {dataset + 1} of [[datasets]] names '{path}' {number} times; use num_repeats instead."
    for dataset in {subset.dataset for subset in subsets}:
        if all(subset.is_reg for subset in subsets if subset.dataset == dataset):
            yield f"number {dataset + 1} of [[datasets]] has regularization images only; add the images to train on."


def _with_names_of_caches(subsets: Sequence[Subset]) -> list[Subset]:
    """Return the subsets, those marked whose images have a cache for each of several sets of buckets."""
    rules = defaultdict(set)
    for subset in subsets:
        rules[subset.image_dir.resolve()].add(subset.rule)
    return [replace(subset, names_bucket=len(rules[subset.image_dir.resolve()]) > 1) for subset in subsets]
