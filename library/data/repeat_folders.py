"""Folders named `10_name`, in which sd-scripts looks for images without metadata: repeats, and a caption for all."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from library.images.kinds import is_image_of_any_kind

_NAME = re.compile(r"(\d{1,6})_(.+)", re.DOTALL)


class RepeatFolder(NamedTuple):
    """A folder of images, how often each is repeated, and the caption of those without caption files."""

    path: Path
    num_repeats: int
    class_tokens: str


def repeat_folders(folder: Path) -> list[RepeatFolder]:
    """Return the folders in `folder` whose name is a number of repeats of 1 or more and a name, in order of names."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:  # names first: a path for each of a hundred thousand files takes seconds
        names = [match for entry in entries if (match := _NAME.fullmatch(entry.name)) and int(match[1]) > 0]
    found = [RepeatFolder(folder / match[0], int(match[1]), match[2]) for match in names]
    return sorted(each for each in found if each.path.is_dir())


def images_elsewhere(folder: Path) -> list[str]:
    """Return the names of images in `folder` itself, and of its folders with images that `repeat_folders` leaves out.

    A folder that cannot be read counts as one without images.
    """
    trained = {each.path.name for each in repeat_folders(folder)}
    with os.scandir(folder) as entries:
        others = [entry for entry in entries if entry.name not in trained]
        return sorted(entry.name for entry in others if (_has_images(entry) if entry.is_dir() else _is_image(entry)))


def _has_images(folder: os.DirEntry[str]) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(map(_is_image, entries))
    except OSError:
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    return is_image_of_any_kind(entry.name)
