"""Metadata keys to image files."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from library.config.errors import UserError
from library.images.files import list_files, warn_of_unreadable
from library.images.kinds import FORMAT_OF_SUFFIX


def image_key(path: Path, *, full_path: bool) -> str:
    """Return the key of an image: its name without suffix, or with `full_path` its path as given."""
    return str(path) if full_path else path.stem


def keys_of_images(images: Sequence[Path], *, full_path: bool) -> dict[str, Path]:
    """Return each image by its key, in the order given; raise `UserError` naming both if two have the same key."""
    image_of: dict[str, Path] = {}
    for image in images:
        first = image_of.setdefault(image_key(image, full_path=full_path), image)
        if first is not image:
            beside = first.parent == image.parent  # they would share their captions and latents under any key
            raise UserError(
                f"'{first}' and '{image}' have the same key '{image_key(image, full_path=full_path)}'.",
                "Remove one of them, or rename it together with its caption files."
                if beside
                else "Rename or remove one of them, or use paths as keys with --full_path.",
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
    """Return the image that a metadata key refers to; None if there is no such file. It always lies in `folder`.

    A key is a file name without suffix (looked up in `by_stem`, of `images_by_stem`), or a path: absolute, or relative
    to the current folder or to `folder`, with slashes or backslashes. A path of another place, such as another machine,
    refers to the image of `folder` that agrees with most of its end, at least with the name. Raise `UserError` if two
    images share the name, or if the path leads to a file elsewhere.
    """
    if key in by_stem:
        return _only(key, by_stem[key])
    existing = [path for path in _spelled(key, folder) if is_file(path)]
    inside = [path for path in existing if _lies_in(path, folder)]
    if inside:
        return inside[0]
    parts = _parts(key)
    if not _is_path(key):
        return None
    for start in range(len(parts)):
        if is_file(folder.joinpath(*parts[start:])):
            return folder.joinpath(*parts[start:])
    named = by_stem.get(_without_suffix(parts[-1]), ()) if parts else ()
    if named:
        return _only(key, named)
    if existing:
        raise UserError(
            f"the key '{key}' leads to '{existing[0]}', outside the image folder '{folder}'.",
            "Correct the key, or name the folder that holds the image.",
        )
    return None


def resolve_cache(key: str, folder: Path) -> Path:
    """Return where the latents of a key lie whose image is gone, by the rule of `resolve_image`; it may not exist."""
    name = _without_suffix(key.replace("\\", "/")) + ".npz"
    inside = [path for path in _spelled(name, folder) if _lies_in(path, folder)]
    tails = [folder.joinpath(*_parts(name)[start:]) for start in range(len(_parts(name)))]
    candidates = [*(inside if _is_path(key) else []), *(tails if _is_path(key) else [folder / name])]
    return next((path for path in candidates if is_file(path)), folder / Path(name).name)


def is_found_by_name(key: str, path: Path, folder: Path) -> bool:
    """Return whether `path`, to which `key` was resolved, lies at another place than the key says."""
    said = {_without_suffix(same_path(spelled)) for spelled in _spelled(key, folder)}
    return _is_path(key) and _without_suffix(same_path(path)) not in said


def images_of_keys(keys: Iterable[str], folder: Path) -> dict[str, Path]:
    """Return the image that each metadata key refers to, where there is one. Raise as `resolve_image`."""
    by_stem = images_by_stem(folder)
    resolved = {key: resolve_image(key, folder, by_stem) for key in keys}
    return {key: image for key, image in resolved.items() if image is not None}


def same_path(path: Path) -> str:
    """Return what equal paths have in common, however they are written: relative, absolute, with ".." in them."""
    return os.path.normpath(path.absolute())


def is_file(path: Path) -> bool:
    """Return whether there is such a file; what no file system accepts as a name refers to none."""
    try:
        return path.is_file()
    except OSError:  # too long
        return False


def _only(key: str, named: Sequence[Path]) -> Path:
    if len(named) > 1:
        raise UserError(
            f"the key '{key}' could refer to '{named[0]}' or '{named[1]}'.",
            "Rename one, or create keys with --full_path.",
        )
    return named[0]


def _spelled(key: str, folder: Path) -> list[Path]:
    """Return what a key says as a path."""
    return [start / path for path in (Path(key), Path(key.replace("\\", "/"))) for start in (Path(), folder)]


def _is_path(key: str) -> bool:
    return "/" in key or "\\" in key or _without_suffix(key) != key


def _parts(key: str) -> list[str]:
    """Return the names of a path behind its drive, its root and whatever climbs."""
    parts = [part for part in key.replace("\\", "/").split("/") if part not in ("", ".")]
    climbs = [index for index, part in enumerate(parts) if part == ".." or part.endswith(":")]
    return parts[climbs[-1] + 1 :] if climbs else parts


def _without_suffix(name: str) -> str:
    """Return a name or path without the suffix of an image."""
    stem, dot, suffix = name.rpartition(".")
    return stem if f"{dot}{suffix}".lower() in FORMAT_OF_SUFFIX else name


def _lies_in(path: Path, folder: Path) -> bool:
    # By the names alone: an image that is a link to a file elsewhere does lie in its folder.
    return Path(same_path(path)).is_relative_to(same_path(folder))
