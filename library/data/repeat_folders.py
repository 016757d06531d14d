"""Folders named `10_name`, in which sd-scripts looks for images without metadata: repeats, and a caption for all."""

import re
from pathlib import Path
from typing import NamedTuple

_NAME = re.compile(r"(\d{1,6})_(.+)", re.DOTALL)


class RepeatFolder(NamedTuple):
    """A folder of images, how often each is repeated, and the caption of those without caption files."""

    path: Path
    num_repeats: int
    class_tokens: str


def repeat_folders(folder: Path) -> list[RepeatFolder]:
    """Return the folders in `folder` whose name is a number of repeats of 1 or more and a name, in order of names."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _NAME.fullmatch(path.name)
        if match is not None and path.is_dir() and int(match[1]) > 0:
            found.append(RepeatFolder(path, int(match[1]), match[2]))
    return found
