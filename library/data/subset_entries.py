"""The entries of a subset with metadata, whether a file or a class of the user has them."""

from collections.abc import Iterator
from pathlib import Path

from library.config.errors import UserError
from library.data.dataset_class import metadata_of_class
from library.data.metadata import Entry, Metadata, entries_in, read_metadata
from library.data.subsets import Subset


def metadata_of(subset: Subset) -> Metadata:
    """Return the entries of a subset with metadata. Raise `UserError` where they cannot be read, or are none."""
    if subset.dataset_class is not None:
        return metadata_of_class(subset.dataset_class, subset.image_dir)
    assert subset.metadata_file is not None
    metadata = read_metadata(subset.metadata_file)
    if not metadata:
        raise _no_images(subset.metadata_file)
    return metadata


def entries_of(subset: Subset) -> Iterator[tuple[str, Entry]]:
    """Yield key and entry of each image, without holding a file in memory. Raise as `metadata_of`.

    A key that comes twice is yielded twice.
    """
    if subset.dataset_class is not None:
        yield from metadata_of_class(subset.dataset_class, subset.image_dir).items()
        return
    assert subset.metadata_file is not None
    count = 0
    for _, key, entry in entries_in(subset.metadata_file):
        yield key, entry
        count += 1
    if not count:
        raise _no_images(subset.metadata_file)


def _no_images(path: Path) -> UserError:
    return UserError(f"'{path}' has no images.", "Make it with the scripts of finetune/.")
