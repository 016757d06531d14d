"""The images of a subset with metadata: searched for, or as the last search found them if nothing has changed."""

import logging

from library.data.image_columns import FoundImages
from library.data.metadata_search import MetadataSearch
from library.data.remembered_search import Remembered, key_of_search, path_of_search, read_search, write_search
from library.data.subset_entries import entries_of
from library.data.subsets import Subset

log = logging.getLogger(__name__)

FEWEST_IMAGES = 4096
"""Of fewer images a search takes a fraction of a second, and is not remembered."""
_SHORTEST_ENTRY = 32  # bytes: a key, and two captions that may be empty


def find_images_of_metadata(
    subset: Subset, is_alone: bool, *, uses_last: bool = True, is_kept: bool = False
) -> FoundImages:
    """Return the images of a subset with metadata; `is_alone` says that there is no other.

    With `uses_last` what the last search found counts where metadata, names in the folder and options are the same;
    with `is_kept` this search is remembered. Raise `UserError` naming images that lack a caption, or else those that
    cannot be trained.
    """
    path, key = path_of_search(subset, is_alone), None
    if path is not None and ((uses_last and path.exists()) or (is_kept and _may_be_large(subset))):
        key = key_of_search(subset, is_alone)  # reads all of the metadata
    if uses_last and path is not None and key is not None:
        last = read_search(path, subset, key)
        if last is not None:
            for notice in last.notices:
                log.info("%s", notice)
            return last.images
    search = MetadataSearch(subset)
    for image_key, entry in entries_of(subset):
        search.add(image_key, entry)
    images = search.found(is_alone=is_alone)
    is_worth = is_kept and search.is_plain and len(images) >= FEWEST_IMAGES
    # The same key twice: neither the metadata nor the folder was changed while it was searched.
    if is_worth and path is not None and key is not None and key_of_search(subset, is_alone) == key:
        write_search(path, subset, key, Remembered(images, tuple(search.notices), search.caption_states()))
    return images


def _may_be_large(subset: Subset) -> bool:
    """Return whether a metadata file has the bytes of as many entries as are remembered."""
    assert subset.metadata_file is not None
    try:
        return subset.metadata_file.stat().st_size >= FEWEST_IMAGES * _SHORTEST_ENTRY
    except OSError:
        return False  # the search explains why it cannot be read
