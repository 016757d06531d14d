"""A data set file prepared for training: the latents of every subset, in the files in which training looks for them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from library.captions.final_captions import CaptionPair
from library.config.errors import UserError, error_of_errors
from library.config.leftovers import remove_leftovers
from library.config.processes import Share, share_of_process
from library.data.cache_files import cache_finder, require_separate_caches
from library.data.folder_images import in_bucket
from library.data.found_images import FoundImage
from library.data.latent_cache import cache_path
from library.data.latent_files import dealt, problem_of, report_buckets, report_names, vae_to_encode, write_latents
from library.data.latent_index import index_path
from library.data.latent_preparation import Encoding, joined_masks
from library.data.latent_writing import Place
from library.data.mask_files import with_masks
from library.data.metadata import train_resolution
from library.data.subset_entries import metadata_of
from library.data.subsets import Subset
from library.images.buckets import BucketedImage
from library.images.crops import LEGACY_CROP_NOTICE
from library.images.files import find_images
from library.images.keys import images_by_stem, resolve_image
from library.images.sizes import ImageSizes

log = logging.getLogger(__name__)

_NO_CAPTIONS = CaptionPair((), ())


class _Wanted(NamedTuple):
    """What a file is to hold, and the file that may hold it already."""

    image: BucketedImage
    flip: bool
    present: Path
    subset: Subset

    def joined(self, other: "_Wanted", file: Path) -> "_Wanted":
        """Return what serves both of two subsets: flipped and masked if one of them is. Raise `UserError` for none."""
        if self.image._replace(mask=None) != other.image._replace(mask=None):
            raise UserError(
                f"two subsets would write different latents to '{file}'.",
                "Let them agree in resolution, buckets and resize_interpolation, or copy the folder.",
            )
        return _Wanted(joined_masks(self.image, other.image), self.flip or other.flip, self.present, self.subset)


def prepare_data_set(
    subsets: Sequence[Subset], model: str, encoding: Encoding, vae_dtype: str, *, skip_existing: bool = True
) -> int:
    """Write the latents of the images of all subsets beside them; return how many images failed.

    With `skip_existing` latents that fit are kept. `vae_dtype` is the name of torch's dtype; the subsets say what is
    flipped. Captions need not be there yet. Raise `UserError` for folders and metadata that cannot be read, and where
    two subsets would write different latents to one file.
    """
    found = _found_images(_with_latents(subsets))
    remove_leftovers(*dict.fromkeys(image.cache.parent for image in found))
    if encoding.legacy_crop:
        log.warning(LEGACY_CROP_NOTICE)
    problems: list[str] = []
    wanted: dict[Path, _Wanted] = {}
    for image, placed in _placed(found, problems):
        name = cache_path(image.path, image.assignment.bucket if placed.subset.names_bucket else None)
        own = _Wanted(image, placed.subset.augmentation.flip_aug, placed.cache, placed.subset)
        wanted[name] = own.joined(wanted.get(name, own), name)
    groups: dict[Encoding, dict[BucketedImage, Place]] = {}
    for name, each in wanted.items():
        place = Place(name, index_path(each.subset), each.subset.image_dir)
        groups.setdefault(replace(encoding, flip=each.flip), {})[each.image] = place
    present = {each.image: each.present for each in wanted.values()}
    vae, digest = vae_to_encode(model, vae_dtype)
    share, own_problems = share_of_process(), list[str]()
    mine = {each: _dealt(places, each.batch_size, share) for each, places in groups.items()}
    kept, written = write_latents(vae, digest, mine, present if skip_existing else {}, own_problems, share)
    for other_kept, other_written, other_problems in share.gathered((kept, written, own_problems)):
        kept, written = kept | other_kept, written | other_written
        problems += other_problems
    if share.is_first:
        report_buckets(kept | written, num_kept=len(kept))
        report_names("images could not be used", problems)
    return len(problems)


def _dealt(places: Mapping[BucketedImage, Place], batch_size: int, share: Share) -> dict[BucketedImage, Place]:
    """Return the files that one process writes."""
    own = dealt({str(place.file): image for image, place in places.items()}, batch_size, share)
    return {image: places[image] for image in own.values()}


def _with_latents(subsets: Sequence[Subset]) -> Iterator[Subset]:
    for subset in subsets:
        names = " and ".join(subset.augmentation.of_pixels)
        if names:
            log.info("images of '%s' are encoded in every step, because of %s", subset.image_dir, names)
        else:
            yield subset


def _found_images(subsets: Iterator[Subset]) -> list[FoundImage]:
    found: list[FoundImage] = []
    errors: list[UserError] = []
    for subset in subsets:
        try:
            of_subset = _found_in_folder(subset) if subset.reads_folder else _found_in_metadata(subset)
            found += with_masks(of_subset, subset)
        except UserError as error:
            errors.append(error)
    if errors:
        raise error_of_errors("subsets cannot be prepared", errors)
    return found


def _found_in_folder(subset: Subset) -> list[FoundImage]:
    files = find_images(subset.image_dir, recursive=False, may_recurse=False)
    require_separate_caches(files)
    find_cache = cache_finder()
    return [FoundImage(file.stem, _NO_CAPTIONS, subset, None, file, find_cache(file), 1.0) for file in files]


def _found_in_metadata(subset: Subset) -> list[FoundImage]:
    by_stem = images_by_stem(subset.image_dir)
    metadata = metadata_of(subset)
    file_of = {key: resolve_image(key, subset.image_dir, by_stem) for key in metadata}
    report_names(
        f"entries of '{subset.source}' have no image in '{subset.image_dir}'",
        [key for key, file in file_of.items() if file is None],
    )
    find_cache = cache_finder()
    files = {key: file for key, file in file_of.items() if file is not None}
    require_separate_caches(files.values())
    return [
        FoundImage(key, _NO_CAPTIONS, subset, train_resolution(metadata[key]), file, find_cache(file), 1.0)
        for key, file in files.items()
    ]


def _placed(found: Sequence[FoundImage], problems: list[str]) -> Iterator[tuple[BucketedImage, FoundImage]]:
    """Yield each image with its bucket, the one of training, and with the cache that training would read."""
    sizes = {on_disk: ImageSizes(on_disk=on_disk) for on_disk in (False, True)}
    for each in found:
        assert each.file is not None
        try:
            size = sizes[each.subset.cache_info].of(each.file)
            assignment = each.assignment(size)
            placed = in_bucket(each._replace(size=size))
        except UserError as error:
            problems.append(problem_of(each.file, error))
            continue
        interpolation = each.subset.augmentation.resize_interpolation
        yield BucketedImage(each.file, size, assignment, interpolation, each.mask), placed
    sizes[True].save()
