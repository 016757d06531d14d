"""The images that the metadata asks for, as they were found: all that is wrong with them at once, and what is odd."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from library.captions.final_captions import CaptionPair
from library.config.errors import UserError, listed
from library.data.latent_cache import bucket_of_cache, cache_path
from library.data.subsets import Subset
from library.images.buckets import BucketAssignment, MaskSource, covering_size
from library.images.keys import is_file, is_found_by_name
from library.images.reading import require_whole
from library.images.sizes import ImageSizes
from library.sdxl.sizes import Size


class FoundImage(NamedTuple):
    """An image of the metadata: its file, None if only its cache is there, and where its cache is or would be.

    `bucket` is the one the metadata names, None where it names none.
    """

    key: str
    captions: CaptionPair
    subset: Subset
    bucket: Size | None
    file: Path | None
    cache: Path
    loss_weight: float
    size: Size | None = None
    own_key: str | None = None
    mask: MaskSource | None = None
    in_shards: bool = False

    @property
    def has_cache(self) -> bool:
        """Whether there are latents that may fit: in the shards beside the metadata, or in the file of the image."""
        return self.in_shards or is_file(self.cache)

    def assignment(self, size: Size) -> BucketAssignment:
        """Return the bucket of the image, which has that size: the one the metadata names, else that of the rule."""
        if self.bucket is None:
            return self.subset.rule.assign(size)
        return BucketAssignment(self.bucket, covering_size(self.bucket, size), self.bucket.aspect - size.aspect)


def require_usable(found: Sequence[FoundImage], subset: Subset) -> list[FoundImage]:
    """Return the images, with their sizes where these are needed and no cache tells them.

    Raise one `UserError` that names every image that cannot be trained, as far as its first bytes tell.
    """
    in_json, folder = subset.source, subset.image_dir
    problems: list[UserError] = []
    needs_pixels = subset.augmentation.changes_pixels
    missing = [image.key for image in found if image.file is None and (needs_pixels or not image.has_cache)]
    if missing:
        latents = " Latents alone do not serve where pixels change at every visit." if needs_pixels else ""
        problems.append(
            UserError(
                f"{len(missing)} images of '{in_json}' are not in '{folder}': {listed(missing)}.",
                "Check --train_data_dir, or remove them from the metadata: the scripts that make it have"
                f" --remove_missing.{latents}",
            )
        )
    sizes = ImageSizes(on_disk=subset.cache_info)
    usable, broken = [], []
    for image in found:
        try:
            usable.append(_checked(image, sizes))
        except UserError as error:
            broken.append(error)
    sizes.save()
    if broken:
        problems.append(error_of_images(broken))
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise UserError("\n  ".join(["the training set is not complete:", *map(str, problems)]))
    return usable


def error_of_images(errors: Sequence[UserError]) -> UserError:
    """Return one error for those of several images."""
    if len(errors) == 1:
        return errors[0]
    remedies = dict.fromkeys(error.remedy for error in errors)
    return UserError(
        f"{len(errors)} images cannot be used: {listed([error.problem.rstrip('.') for error in errors])}.",
        " ".join(list(remedies)[:3]),
    )


def require_own_files(found: Iterable[FoundImage], folder: Path) -> None:
    """Raise `UserError` if two images share a cache, or two keys an image that one of them does not name."""
    first_of: dict[Path, FoundImage] = {}
    for image in found:
        where = image.cache if image.file is None else cache_path(image.file)
        first = first_of.setdefault(where, image)
        if first is image:
            continue
        if first.file == image.file:
            place = image.file or image.cache
            if not any(is_found_by_name(each.key, place, folder) for each in (first, image)):
                continue  # one image, two captions
            raise UserError(
                f"the keys '{first.key}' and '{image.key}' both lead to '{place}'.",
                "Remove one of them from the metadata.",
            )
        raise UserError(
            f"'{first.file or first.cache}' and '{image.file or image.cache}' would share the latents file"
            f" '{where.name}'.",
            "Remove one of them, or rename it together with its caption files.",
        )


def _checked(image: FoundImage, sizes: ImageSizes) -> FoundImage:
    """Return the image with its size, if that is needed. Raise `UserError` for one that cannot be trained."""
    if image.file is None and image.in_shards:
        return image
    if image.file is None and is_file(image.cache):
        bucket = bucket_of_cache(image.cache)
        if image.bucket not in (None, bucket):
            raise UserError(
                f"'{image.cache}' does not fit: it is for {bucket}, not {image.bucket}.",
                "Run prepare_buckets_latents.py again where the images are.",
            )
    elif image.file is not None and (image.subset.reads_folder or not image.has_cache):
        size = sizes.of(image.file)
        if not image.has_cache:
            require_whole(image.file)
        if image.bucket is None:
            image.subset.rule.assign(size)
        return image._replace(size=size)
    return image
