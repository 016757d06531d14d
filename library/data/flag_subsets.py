"""What flags describe as subsets: one, or one for each folder named 10_name."""

import logging
from dataclasses import replace
from pathlib import Path

from library.captions.options import CaptionOptions, caption_extension, resolve
from library.config.errors import listed
from library.data.loader_options import LoaderOptions
from library.data.repeat_folders import RepeatFolder, images_elsewhere, repeat_folders
from library.data.subsets import Subset
from library.data.training_set_options import TrainingSetOptions
from library.images.buckets import BucketRule

log = logging.getLogger(__name__)


def subsets_of_flags(
    training_set: TrainingSetOptions, loader: LoaderOptions, captions: CaptionOptions, rule: BucketRule
) -> list[Subset]:
    """Return what the command line describes: one subset, or without metadata one for each folder named as 10_name."""
    subset = subset_of_flags(training_set, loader, captions, rule)
    if not subset.reads_folder:
        return [subset]
    assert training_set.train_data_dir is not None  # checked by problems()
    for folder in filter(None, (training_set.train_data_dir, training_set.reg_data_dir)):
        if elsewhere := images_elsewhere(folder):
            names = listed([f"'{name}'" for name in elsewhere])
            log.warning("not trained, since only folders of '%s' named as 10_name are: %s", folder, names)
    subsets = [
        replace(_of_repeat_folder(subset, each, ""), mask_dir=_mask_dir_of(subset.mask_dir, each))
        for each in repeat_folders(training_set.train_data_dir)
    ]
    regular, of_regular = replace(subset.as_regularization(), mask_dir=None), training_set.reg_data_dir
    if of_regular is not None:
        subsets += [_of_repeat_folder(regular, each, f"{of_regular.name}/") for each in repeat_folders(of_regular)]
    return subsets


def _mask_dir_of(masks: Path | None, folder: RepeatFolder) -> Path | None:
    """Return the folder of masks of the same name as the folder of images, or else the one for all."""
    own = None if masks is None else masks / folder.path.name
    return own if own is not None and own.is_dir() else masks


def _of_repeat_folder(subset: Subset, folder: RepeatFolder, place: str) -> Subset:
    return replace(
        subset,
        image_dir=folder.path,
        num_repeats=folder.num_repeats * subset.num_repeats,
        class_tokens=folder.class_tokens,
        key_prefix=f"{place}{folder.path.name}/",
        is_of_file=True,
    )


def subset_of_flags(
    training_set: TrainingSetOptions, loader: LoaderOptions, captions: CaptionOptions, rule: BucketRule
) -> Subset:
    """Return the one subset that the command line describes. Raise `UserError` for unreadable protected tags."""
    assert training_set.train_data_dir is not None  # checked by problems()
    return Subset(
        image_dir=training_set.train_data_dir,
        metadata_file=training_set.in_json,
        rule=rule,
        one_caption=training_set.one_caption,
        batch_size=loader.train_batch_size,
        num_repeats=training_set.dataset_repeats,
        captions=resolve([vars(captions)]),
        extension_l=caption_extension([vars(captions)], "l"),
        extension_g=caption_extension([vars(captions)], "g"),
        augmentation=training_set.augmentation,
        alpha_mask=training_set.alpha_mask,
        mask_dir=training_set.conditioning_data_dir,
        prior_loss_weight=training_set.prior_loss_weight,
        cache_info=training_set.cache_info,
        dataset_class=training_set.dataset_class,
    )
