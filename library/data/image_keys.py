"""Metadata keys to image files."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from library.config.errors import UserError
from library.data.image_files import list_files, warn_of_unreadable


def image_key(path: Path, *, full_path: bool) -> str:
    """Return the key of an image: its name without suffix, or with `full_path` its path as given."""
    return str(path) if full_path else path.stem


def keys_of_images(images: Sequence[Path], *, full_path: bool) -> dict[str, Path]:
    """Return each image by its key, in the order given; raise `UserError` naming both if two have the same key."""
    image_of: dict[str, Path] = {}
    for image in images:
        first = image_of.setdefault(image_key(image, full_path=full_path), image)
        if first is not image:
            raise UserError(
                f"'{first}' and '{image}' have the same key '{image_key(image, full_path=full_path)}'.",
                "Rename or remove one of them, or use paths as keys with --full_path.",
            )
    return image_of


def images_by_stem(folder: Path) -> dict[str, list[Path]]:
    """Return the images of each file name without suffix: those in `folder` itself if any, else in its subfolders.

    An index for `resolve_image`. Raise `UserError` if the folder does not exist or cannot be read.
    """
    at_top: dict[str, list[Path]] = {}
    below: dict[str, list[Path]] = {}
    images, unreadable = list_files(folder, recursive=True)
    warn_of_unreadable(unreadable)
    for image in images:
        index = at_top if image.parent == folder else below
        index.setdefault(image.stem, []).append(image)
    return below | at_top


def resolve_image(key: str, folder: Path, by_stem: Mapping[str, Sequence[Path]]) -> Path | None:
    """Return the image that a metadata key refers to, None if there is no such file.

    A key is a file name without suffix (looked up in `by_stem`, of `images_by_stem`), or a path: absolute, or relative
    to `folder` or to the current folder, with slashes or backslashes. Raise `UserError` if two images share the name,
    or if the path climbs out of `folder` by "..".
    """
    named = by_stem.get(key, ())
    if len(named) > 1:
        raise UserError(
            f"the key '{key}' could refer to '{named[0]}' or '{named[1]}'.",
            "Rename one, or use paths as keys with --full_path.",
        )
    if named:
        return named[0]
    spellings = [Path(key), Path(key.replace("\\", "/"))]
    candidates = [start / path for path in spellings for start in (Path(), folder)]
    found = [path for path in candidates if is_file(path)]
    inside = [path for path in found if ".." not in path.parts or _lies_in(path, folder)]
    if len(set(inside)) > 1:  # an image of the folder comes before one of the current folder with the same name
        inside.sort(key=lambda path: not _lies_in(path, folder))
    if found and not inside:
        raise UserError(
            f"the key '{key}' leads to '{found[0]}', outside the image folder '{folder}'.",
            "Correct the key, or name the folder that holds the image.",
        )
    return inside[0] if inside else None


def images_of_keys(keys: Iterable[str], folder: Path) -> dict[str, Path]:
    """Return the image that each metadata key refers to, where there is one. Raise as `resolve_image`."""
    by_stem = images_by_stem(folder)
    resolved = {key: resolve_image(key, folder, by_stem) for key in keys}
    return {key: image for key, image in resolved.items() if image is not None}


def same_path(path: Path) -> str:
    """Return what equal paths have in common, however they are written: relative, absolute, with ".." in them."""
    return os.path.normpath(path.absolute())


def is_file(path: Path) -> bool:
    """Return whether the file exists; a name that no file system accepts does not."""
    try:
        return path.is_file()
    except OSError:  # too long
        return False


def _lies_in(path: Path, folder: Path) -> bool:
    # By the names alone: an image that is a link to a file elsewhere does lie in its folder.
    return Path(same_path(path)).is_relative_to(same_path(folder))
