"""A data set file (TOML or JSON, in the schema of kohya's trainers) to the subsets that it describes."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from library.config.errors import UserError, error_of_problems
from library.data.augmentation import Augmentation, interpolation_of, parse_face_range
from library.data.buckets import BucketOptions, parse_resolution
from library.data.caption_options import CaptionOptions, caption_extension, resolve, rule_problems
from library.data.dataset_schema import WITHOUT_EFFECT, converted, read_tables
from library.data.loader_options import LoaderOptions
from library.data.subsets import Subset, TrainingSetOptions

log = logging.getLogger(__name__)

Level = Mapping[str, Any]

AUGMENTATION_KEYS = ("flip_aug", "color_aug", "random_crop", "face_crop_aug_range", "resize_interpolation")


def read_dataset_config(
    path: Path,
    training_set: TrainingSetOptions,
    loader: LoaderOptions,
    captions: CaptionOptions,
    buckets: BucketOptions,
) -> list[Subset]:
    """Return the subsets of a data set file.

    What a subset leaves out its data set says, or else `[general]`, or else the command line. Raise `UserError` that
    lists what cannot work: unknown keys, wrong values, folders that do not exist or are named twice in a data set.
    """
    tables = read_tables(path)
    flags = _level_of_flags(training_set, loader, captions, buckets)
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
            problems += [f"'{path}': {problem}" for problem in rule_problems(subsets[-1].captions)]
    problems += [f"'{path}': {problem}" for problem in _folder_problems(subsets)]
    if problems:
        raise error_of_problems(list(dict.fromkeys(problems)))
    said = {
        key for dataset, members in tables.datasets for level in (tables.general, dataset, *members) for key in level
    }
    for key in WITHOUT_EFFECT:
        if key in said:
            log.info("'%s': %s has no effect: %s", path, key, WITHOUT_EFFECT[key])
    return _with_names_of_caches(subsets)


def _level_of_flags(
    training_set: TrainingSetOptions, loader: LoaderOptions, captions: CaptionOptions, buckets: BucketOptions
) -> dict[str, Any]:
    return {
        **vars(captions),
        **vars(buckets),
        "batch_size": loader.train_batch_size,
        "num_repeats": training_set.dataset_repeats,
        "resolution": training_set.resolution,
        "enable_bucket": training_set.enable_bucket,
        **{name: getattr(training_set, name) for name in AUGMENTATION_KEYS},
        "prior_loss_weight": training_set.prior_loss_weight,
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
    is_reg, face_range = decided("is_reg", False), decided("face_crop_aug_range")
    return Subset(
        image_dir=metadata_file.parent if folder is None and metadata_file else _located(path, folder),
        metadata_file=metadata_file,
        rule=buckets.rule(parse_resolution(",".join(map(str, sides))), enabled=decided("enable_bucket")),
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
        loss_weight=float(decided("loss_weight", 1.0)) * (decided("prior_loss_weight") if is_reg else 1.0),
        is_reg=is_reg,
        class_tokens=decided("class_tokens"),
        is_of_file=True,
    )


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
