"""The images of metadata: entries to image files, caches and captions."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from library.config.errors import UserError
from library.data.cache_files import cache_finder
from library.data.caption_sources import warn_of_changed_captions
from library.data.dataset_class import metadata_of_class
from library.data.found_images import FoundImage, notices, require_usable
from library.data.image_keys import images_by_stem, resolve_cache, resolve_image
from library.data.metadata import (
    Entry,
    Metadata,
    captions_of,
    is_reg,
    loss_weight,
    read_metadata,
    require_captions,
    sentence_of_sources,
    train_resolution,
)
from library.data.subsets import Subset

log = logging.getLogger(__name__)


def find_images_of_metadata(subset: Subset, is_alone: bool) -> list[FoundImage]:
    """Return the images of a subset with metadata; `is_alone` says that there is no other.

    Raise `UserError` naming those that lack a caption, or else those that cannot be trained.
    """
    source = subset.source
    assert source is not None
    metadata = metadata_of(subset)
    require_captions(metadata, source, one_caption=subset.one_caption)
    sources = sentence_of_sources(metadata, one_caption=subset.one_caption)
    if sources is not None:
        log.info("%s", sources)
    by_stem = images_by_stem(subset.image_dir)
    find_cache = cache_finder()
    regular = subset.as_regularization()
    found = [
        _found(key, entry, regular if is_reg(entry) else subset, by_stem, find_cache) for key, entry in metadata.items()
    ]
    found = require_usable(found, subset)
    for notice in notices(found, subset, by_stem, is_alone=is_alone):
        log.info("%s", notice)
    if subset.metadata_file is not None and not subset.one_caption:
        file_of = {image.key: image.file for image in found}
        warn_of_changed_captions(subset.metadata_file, metadata, file_of, (subset.extension_l, subset.extension_g))
    return found


def metadata_of(subset: Subset) -> Metadata:
    """Return the entries of a subset with metadata. Raise `UserError` where they cannot be read, or are none."""
    if subset.dataset_class is not None:
        return metadata_of_class(subset.dataset_class, subset.image_dir)
    assert subset.metadata_file is not None
    metadata = read_metadata(subset.metadata_file)
    if not metadata:
        raise UserError(f"'{subset.metadata_file}' has no images.", "Make it with the scripts of finetune/.")
    return metadata


def _found(
    key: str,
    entry: Entry,
    subset: Subset,
    by_stem: Mapping[str, Sequence[Path]],
    find_cache: Callable[[Path], Path],
) -> FoundImage:
    file = resolve_image(key, subset.image_dir, by_stem)
    cache = find_cache(resolve_cache(key, subset.image_dir) if file is None else file)
    separators = subset.captions.rules_l.caption_separator, subset.captions.rules_g.caption_separator
    captions = captions_of(entry, one_caption=subset.one_caption, separators=separators)
    weight = loss_weight(entry) * subset.loss_weight
    return FoundImage(key, captions, subset, train_resolution(entry), file, cache, weight)
