"""The images of folders without metadata: captions from the files beside them, buckets from the rule of the subset."""

from collections.abc import Iterable
from pathlib import Path

from library.config.errors import UserError
from library.data.cache_files import cache_finder
from library.data.caption_files import entries_of_folder
from library.data.found_images import FoundImage, require_own_files, require_usable
from library.data.image_columns import FoundBuilder, FoundImages
from library.data.latent_cache import bucket_of_cache, cache_path
from library.data.metadata import captions_of
from library.data.subsets import Subset
from library.images.keys import is_file
from library.images.reading import read_size
from library.sdxl.sizes import Size


def find_images_of_folder(subset: Subset) -> list[FoundImage]:
    """Return the images of a subset without metadata. Raise `UserError` naming those that cannot be trained."""
    entries = entries_of_folder(subset.image_dir, subset.extension_l, subset.extension_g, subset.class_tokens)
    find_cache = cache_finder()
    found = [
        FoundImage(
            key=file.stem,
            captions=captions_of(entry),
            subset=subset,
            bucket=None,
            file=file,
            cache=find_cache(file),
            loss_weight=subset.loss_weight,
        )
        for file, entry in entries.items()
    ]
    require_own_files(found, subset.image_dir)
    return require_usable(found, subset)


def with_distinct_keys(found: Iterable[FoundImage]) -> FoundImages:
    """Return the images, the prefix of their subset before each key.

    So a key, and all that is drawn for it, stays the same whatever subsets are added. Only what several data sets take
    from one folder for one resolution is numbered.
    """
    images = FoundImages.of(found)
    sources = {(subset.source, subset.image_dir) for subset in images.used_subsets}
    if len(sources) == 1 and not any(subset.key_prefix for subset in images.used_subsets):
        return images  # the keys of one file are different
    counts: dict[str, int] = {}
    builder = FoundBuilder()
    for image in images:
        key = name = f"{image.subset.key_prefix}{image.key}"
        while name in counts:  # again for an image whose own name is "01 (2)"
            counts[key] += 1
            name = f"{key} ({counts[key]})"
        counts[name] = 1
        builder.add(image._replace(key=name, own_key=image.key))
    return builder.built()


def in_bucket(found: FoundImage) -> FoundImage:
    """Return an image with its bucket and the cache file for that.

    Images of metadata stay as they are, unless their caches are named with the bucket.
    """
    if found.file is None or not (found.subset.reads_folder or found.subset.names_bucket):
        return found
    cache, bucket = found.cache, found.bucket
    if bucket is None:
        bucket = found.subset.rule.assign(found.size or read_size(found.file)).bucket
    if found.subset.names_bucket:
        named = cache_path(found.file, bucket)
        cache = named if is_file(named) or not _is_of_bucket(cache, bucket) else cache
    return found._replace(bucket=bucket, cache=cache)


def _is_of_bucket(cache: Path, bucket: Size) -> bool:
    try:
        return is_file(cache) and bucket_of_cache(cache) == bucket
    except UserError:  # a damaged one, beside which another is written
        return False
