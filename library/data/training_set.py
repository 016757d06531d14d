"""Metadata, images and caches to the images to train on."""

import logging
from collections.abc import Sequence

from library.config.errors import UserError, error_of_errors
from library.config.magnitudes import MOST_VISITS
from library.data.folder_images import find_images_of_folder, with_distinct_keys
from library.data.found_images import FoundImage
from library.data.image_columns import FoundImages
from library.data.mask_files import require_usable_masks, with_masks
from library.data.metadata_images import find_images_of_metadata
from library.data.subsets import Subset
from library.images.buckets import ALPHA

log = logging.getLogger(__name__)


def find_training_images(subsets: Sequence[Subset], *, uses_last: bool = True, is_kept: bool = False) -> FoundImages:
    """Return every image of the subsets with its files; reads the metadata, lists the folders and opens no network.

    With `uses_last` what the last search found counts where it would be found again; with `is_kept` this search is kept
    for the next.
    Raise `UserError` naming, of all subsets, the images that lack a caption, or else those that have neither a usable
    image file nor a usable cache, or no bucket; report what else the user should know.
    """
    is_alone = len(subsets) == 1
    parts: list[FoundImages] = []
    errors: list[UserError] = []
    for subset in subsets:
        try:
            if subset.reads_folder:
                images: Sequence[FoundImage] = find_images_of_folder(subset)
            else:
                images = find_images_of_metadata(subset, is_alone, uses_last=uses_last, is_kept=is_kept)
            _require_countable(len(images), subset)
            parts.append(_masked(FoundImages.of(images), subset))
        except UserError as error:
            errors.append(error)
    if errors:
        raise error_of_errors("subsets cannot be trained", errors)
    found = FoundImages.joined(parts)
    _require_others_than_regularization(found, subsets)
    if any(subset.has_masks for subset in subsets):
        require_usable_masks(found)
    return with_distinct_keys(found)


def _masked(images: FoundImages, subset: Subset) -> FoundImages:
    if subset.mask_dir is not None:
        return FoundImages.of(with_masks(images, subset))
    return images.with_masks(ALPHA) if subset.alpha_mask else images


def _require_countable(num_images: int, subset: Subset) -> None:
    num_visits = num_images * subset.num_repeats
    if num_visits > MOST_VISITS:
        raise UserError(
            f"{subset.num_repeats} repeats of the images of '{subset.source or subset.image_dir}' make an epoch of "
            f"{num_visits} images.",
            f"Lower --dataset_repeats: an epoch may have {MOST_VISITS}. --max_train_steps decides how long a run is.",
        )


def _require_others_than_regularization(found: FoundImages, subsets: Sequence[Subset]) -> None:
    used = found.used_subsets
    for dataset in {subset.dataset for subset in subsets}:
        members = [subset for subset in used if subset.dataset == dataset]
        if members and all(subset.is_reg for subset in members):
            raise UserError(
                f"all images of '{members[0].source or members[0].image_dir}' are regularization images (is_reg).",
                "Add the images to train on.",
            )
    is_weighted = any(subset.prior_loss_weight != 1 for subset in subsets)
    if is_weighted and not any(subset.is_reg for subset in used):
        raise UserError(
            "--prior_loss_weight has no effect: no image is marked as a regularization image.",
            "Mark them by is_reg, or leave the flag out.",
        )
