"""Which images of a folder are to be captioned, and which process of several captions them."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from library.config.errors import UserError, listed
from library.config.processes import Share
from library.images.files import find_images
from library.images.kinds import without_suffix


class Pending(NamedTuple):
    """The images that this process captions, how many there are in all, and how many have a caption file.

    `folders` are those of all images.
    """

    images: list[Path]
    folders: list[Path]
    num_images: int
    num_existing: int


def pending_images(
    folder: Path, extension: str, *, recursive: bool, keep_existing: bool, batch_size: int, share: Share
) -> Pending:
    """Return what a process has to caption.

    Batches of the whole listing are dealt out in turn: the processes need not agree on what is done already, and
    what they caption in an untouched folder is batch by batch what a single process would. Raise `UserError` for a
    folder without images, and for two images that would share a caption file.
    """
    images = find_images(folder, recursive=recursive)
    _require_separate_files(images, extension)
    folders = [Path(name) for name in dict.fromkeys(map(os.path.dirname, images))]
    exists = list(have_caption_file(images, extension)) if keep_existing else [False] * len(images)
    own = [share.has(index // batch_size) for index in range(len(images))]
    to_do = [image for image, is_done, is_own in zip(images, exists, own, strict=True) if is_own and not is_done]
    return Pending(to_do, folders, len(images), sum(exists))


def have_caption_file(images: Iterable[Path], extension: str) -> Iterator[bool]:
    """Yield whether there is a caption file beside each image: folders are listed once, no file is asked for."""
    names_of: dict[str, set[str]] = {}
    for image in images:
        folder, name = os.path.split(image)
        if folder not in names_of:
            names_of[folder] = {os.path.normcase(each) for each in os.listdir(folder or ".")}  # noqa: PTH208 (faster)
        yield os.path.normcase(without_suffix(name) + extension) in names_of[folder]


def caption_file(image: Path, extension: str) -> Path:
    """Return the caption file of an image, as the merge scripts look for it."""
    return image.parent / f"{image.stem}{extension}"


def _require_separate_files(images: Sequence[Path], extension: str) -> None:
    first_of: dict[str, Path] = {}
    shared = []
    for image in images:
        start = without_suffix(image)
        first = first_of.setdefault(start, image)
        if first is not image:
            shared.append(f"'{first}' and '{image.name}'")
    if shared:
        raise UserError(
            f"{len(shared)} pairs of images would share their {extension} file: {listed(shared)}.",
            "Rename or remove one of each.",
        )
