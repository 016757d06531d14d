"""Which mask belongs to which image, and masks that cannot be used, before anything is loaded."""

import logging
import math
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from library.config.errors import UserError, listed
from library.data.found_images import FoundImage, error_of_images
from library.data.latent_cache import cache_holds_mask
from library.data.subsets import Subset
from library.images.buckets import ALPHA, MaskSource
from library.images.crops import true_crop_ltrb
from library.images.files import list_files, warn_of_unreadable
from library.images.keys import is_file
from library.images.masks import black_mask, require_size
from library.images.reading import has_alpha, load_mask, load_rgb_and_alpha, read_size
from library.sdxl.sizes import Size

log = logging.getLogger(__name__)

_MOST_THREADS = 4

Box = tuple[int, int, int, int]


def with_masks(found: Sequence[FoundImage], subset: Subset) -> list[FoundImage]:
    """Return the images of a subset, each with the source of its mask; raise as `masks_of`."""
    where = {image.key: image.file or image.cache for image in found}
    regular = {image.key for image in found if image.subset.is_reg}
    masks = masks_of(where, subset.image_dir, subset.mask_dir, alpha_mask=subset.alpha_mask, need_none=regular)
    return [image._replace(mask=masks[image.key]) for image in found]


def masks_of(
    images: Mapping[str, Path],
    image_dir: Path,
    mask_dir: Path | None,
    *,
    alpha_mask: bool,
    need_none: Collection[str] = (),
) -> dict[str, MaskSource | None]:
    """Return the source of the mask of each image, by its key.

    That is the file of `mask_dir` at the same place or, failing that, of the same name; else with `alpha_mask` the
    alpha channel. Raise `UserError` naming the images that have none, but for those that `need_none`.
    """
    otherwise: MaskSource | None = ALPHA if alpha_mask else None
    if mask_dir is None:
        return dict.fromkeys(images, otherwise)
    files, unreadable = list_files(mask_dir, recursive=True)
    warn_of_unreadable(unreadable)
    by_place = {path.relative_to(mask_dir).with_suffix(""): path for path in files}
    by_name: dict[str, list[Path]] = {}
    for path in files:
        by_name.setdefault(path.stem, []).append(path)
    masks = {key: _file_of(path, image_dir, by_place, by_name) or otherwise for key, path in images.items()}
    missing = [key for key, mask in masks.items() if mask is None and key not in need_none]
    if missing:
        raise UserError(
            f"{len(missing)} images of '{image_dir}' have no mask in '{mask_dir}': {listed(missing)}.",
            "Save one of the same name for each, white where the image is trained.",
        )
    unused = sorted(f"'{path.name}'" for path in set(files) - set(masks.values()))
    if unused:
        log.info("%d masks of '%s' belong to no image: %s", len(unused), mask_dir, listed(unused))
    return masks


def _file_of(
    path: Path, image_dir: Path, by_place: Mapping[Path, Path], by_name: Mapping[str, Sequence[Path]]
) -> Path | None:
    if path.is_relative_to(image_dir):
        place = path.relative_to(image_dir).with_suffix("")
        if place in by_place:
            return by_place[place]
    named = by_name.get(path.stem, [])
    if len(named) > 1:
        raise UserError(
            f"the mask of '{path}' could be '{named[0]}' or '{named[1]}'.",
            "Sort the masks into folders as the images are, or rename one.",
        )
    return named[0] if named else None


def require_usable_masks(found: Sequence[FoundImage]) -> None:
    """Report how many images have masks. Raise `UserError` naming those whose masks cannot be used.

    Masks of another size than the image, and masks that are black wherever the image is trained. Those that are cached
    with the latents are checked when these are read.
    """
    masked = [image for image in found if image.mask is not None]
    if not masked:
        return
    to_check = [
        image for image in masked if not (image.in_shards or (is_file(image.cache) and cache_holds_mask(image.cache)))
    ]
    lacking = [image for image in to_check if image.file is None]
    if lacking:
        raise UserError(
            f"the latents of {len(lacking)} images lack masks, and the images are gone: "
            f"{listed([image.key for image in lacking])}.",
            "Run prepare_buckets_latents.py where the images are, with --alpha_mask or --conditioning_data_dir.",
        )
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        checked = pool.map(_error_of, to_check)
        errors = list(tqdm(checked, "checking masks", len(to_check), unit="image", disable=None if to_check else True))
    unusable = [error for error in errors if error is not None]
    if unusable:
        raise error_of_images(unusable)
    _report(found)


def _report(found: Sequence[FoundImage]) -> None:
    num_files = sum(isinstance(image.mask, Path) for image in found)
    of_alpha = [image for image in found if image.mask == ALPHA]
    num_transparent = sum(image.file is None or has_alpha(image.file) for image in of_alpha)
    if not num_files and not num_transparent:
        raise UserError(
            f"--alpha_mask: none of {len(of_alpha)} images has an alpha channel.",
            "Save them as PNG or WebP with transparency, or leave out --alpha_mask.",
        )
    kinds = {"from files": num_files, "from alpha channels": num_transparent}
    log.info(
        "masks: %s, of %d images; the others are trained whole",
        " and ".join(f"{number} {kind}" for kind, number in kinds.items() if number),
        len(found),
    )


def _error_of(image: FoundImage) -> UserError | None:
    """Return what is wrong with the mask of an image, which lies on the disk; None if it can be used."""
    assert image.file is not None
    assert image.mask is not None
    try:
        size = image.size or read_size(image.file)
        if image.mask == ALPHA:
            mask = load_rgb_and_alpha(image.file)[1] if has_alpha(image.file) else None
        else:
            require_size(image.mask, size)
            mask = load_mask(image.mask)
    except UserError as error:
        return error
    if mask is not None and mask.crop(_trained_box(image, size)).getbbox() is None:
        return black_mask(image.mask, image.file)
    return None


def _trained_box(image: FoundImage, size: Size) -> Box:
    """Return the pixels of the image that may be trained: left, top, right, bottom."""
    if image.subset.augmentation.moves_crop:
        return 0, 0, size.width, size.height
    bucket, resized, _ = image.assignment(size)
    across, down = size.width / resized.width, size.height / resized.height
    left, top, right, bottom = true_crop_ltrb(bucket, resized)
    return math.floor(left * across), math.floor(top * down), math.ceil(right * across), math.ceil(bottom * down)
