"""The image files of a folder: those that are used, and those that look like images and cannot be read here."""

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from library.config.digests import digest
from library.config.errors import UserError, listed
from library.images.kinds import (
    FORMAT_OF_SUFFIX,
    is_readable,
    readable_suffixes,
    remedy_for,
    suffix_of,
    suffixes_of_images,
    without_suffix,
)

log = logging.getLogger(__name__)


class Listing(NamedTuple):
    """The image files of a folder, sorted: those that can be read, and those of a kind that cannot be read here.

    A file of the second kind does not count where one that can be read has the same name but for the suffix.
    """

    images: list[Path]
    unreadable: list[Path]


def list_files(folder: Path, *, recursive: bool) -> Listing:
    """Return the image files of `folder`, by suffix; with `recursive` those of its subfolders too. May be empty.

    Hidden files and folders (name starts with a dot) are left out. Links to folders are followed, but never round in
    circles. Raises `UserError` if the folder does not exist or cannot be read.
    """
    readable, of_images = readable_suffixes(), suffixes_of_images()
    images: list[str] = []
    others: list[str] = []
    with _explained(folder):
        for start, name in _files(folder, recursive):
            suffix = suffix_of(name)
            if suffix in of_images:
                (images if suffix in readable else others).append(start + name)
    if others:
        used = {without_suffix(path) for path in images}
        others = [path for path in others if without_suffix(path) not in used]
    return Listing(*([Path(path) for path in sorted(paths, key=_as_posix)] for paths in (images, others)))


def has_images(folder: Path) -> bool:
    """Return whether a folder itself holds an image that can be read. Raise `UserError` as `list_files`."""
    readable = readable_suffixes()
    with _explained(folder):
        return any(suffix_of(name) in readable for _, name in _files(folder, recursive=False))


class Suffixes(NamedTuple):
    """The files of one name but for their suffixes: all of these, and those of images that can be read here or not."""

    all: frozenset[str]
    images: tuple[str, ...]
    unreadable: tuple[str, ...]


class FolderNames:
    """The names in a folder and its subfolders, listed once: `folders` has the suffixes of each stem, by folder.

    A folder is named with a separator at its end; the suffixes stand in one text, the same for all stems that have the
    same. A million images take 200 MB less than as paths. Raise `UserError` as `list_files`.
    """

    def __init__(self, top: Path):
        self.start = str(top / "_")[:-1]
        self.folders: dict[str, dict[str, str]] = {self.start: {}}
        readable, images = readable_suffixes(), suffixes_of_images()
        with _explained(top):
            for start, name in _files(top, recursive=True):
                stem, dot, suffix = name.rpartition(".")
                names = self.folders.setdefault(start, {})
                if not dot:
                    stem, suffix = name, ""
                names[stem] = sys.intern(names.get(stem, "") + dot + suffix)

        @cache
        def described(suffixes: str) -> Suffixes:
            found = tuple(f".{suffix}" for suffix in suffixes.split(".")[1:])
            of_images = tuple(suffix for suffix in found if suffix.lower() in readable)
            others = tuple(suffix for suffix in found if suffix.lower() in images and suffix not in of_images)
            return Suffixes(frozenset(found), of_images, others)

        self.described = described

    def images(self) -> Iterator[str]:
        """Yield the images that can be read, in no order."""
        for start, names in self.folders.items():
            for stem, suffixes in names.items():
                for suffix in self.described(suffixes).images:
                    yield f"{start}{stem}{suffix}"

    def unreadable(self) -> list[Path]:
        """Return the images that cannot be read and have no other of the same name, sorted."""
        found = [
            Path(f"{start}{stem}{suffix}")
            for start, names in self.folders.items()
            if any(self.described(suffixes).unreadable for suffixes in set(names.values()))
            for stem, suffixes in names.items()
            if not self.described(suffixes).images
            for suffix in self.described(suffixes).unreadable
        ]
        return sorted(found, key=Path.as_posix)

    def by_stem(self) -> dict[str, list[Path]]:
        """Return what `images_by_stem` does."""
        at_top: dict[str, list[Path]] = {}
        below: dict[str, list[Path]] = {}
        for path in sorted(self.images(), key=_as_posix):
            start, name = os.path.split(path)
            index = at_top if os.path.join(start, "") == self.start else below  # noqa: PTH118
            index.setdefault(os.path.splitext(name)[0], []).append(Path(path))  # noqa: PTH122
        return below | at_top


def digest_of_names(folder: Path, *, without: Path) -> bytes:
    """Return a digest of the names of all files in a folder and its subfolders but `without`.

    The order is that of the disk, which changes with the names; were it to change alone, the digest would be another.
    Raise `UserError` as `list_files`.
    """
    left_out = str(without / "_")[:-1]
    with _explained(folder):
        files = groupby(_files(folder, recursive=True), key=itemgetter(0))
        parts = (
            "\0".join([start, *(name for _, name in names), "", ""]) for start, names in files if start != left_out
        )
        return digest(part.encode("utf-8", "surrogatepass") for part in parts)


def find_images(folder: Path, *, recursive: bool, may_recurse: bool = True) -> list[Path]:
    """Return the images of `list_files`, naming those that cannot be read; raise `UserError` if there is none.

    `may_recurse` says that the script has the flag --recursive.
    """
    images, unreadable = list_files(folder, recursive=recursive)
    if not images and unreadable:
        raise UserError(f"no image in '{folder}' can be used:", describe_unreadable(unreadable))
    if not images:
        where = "it and its subfolders hold" if recursive else "it holds"
        suffixes = ", ".join(sorted(suffix for suffix in FORMAT_OF_SUFFIX if is_readable(Path(f"x{suffix}"))))
        raise UserError(
            f"no images in '{folder}': {where} no file that ends in {suffixes}.",
            f"Give the folder of the images{', or --recursive' if may_recurse and not recursive else ''}.",
        )
    warn_of_unreadable(unreadable)
    return images


def warn_of_unreadable(paths: Sequence[Path]) -> None:
    """Name the files that look like images and are left out, if there are any."""
    if paths:
        log.warning("%d images are left out: %s", len(paths), describe_unreadable(paths))


def describe_unreadable(paths: Iterable[Path]) -> str:
    """Return what to tell the user of files whose kind cannot be read here: their names, and what would help."""
    by_remedy: dict[str, list[str]] = {}
    for path in paths:
        by_remedy.setdefault(remedy_for(FORMAT_OF_SUFFIX.get(path.suffix.lower())), []).append(f"'{path}'")
    return " ".join(f"{listed(names)} cannot be read here. {remedy}" for remedy, names in by_remedy.items())


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot read the image folder '{error.filename or folder}': {error.strerror or error}.",
            "Give the folder of the images.",
        ) from error


def _as_posix(path: str) -> str:
    return path.replace(os.sep, "/")


def _files(top: Path, recursive: bool) -> Iterator[tuple[str, str]]:
    """Yield folder (with a separator at its end) and name of each file that is not hidden."""
    # A list of what is to come, not recursion: folders may lie deeper in one another than Python may call.
    waiting: list[tuple[Path, frozenset[Path]]] = [(top, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        here = above | {folder.resolve()}
        start = str(folder / "_")[:-1]
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if not _is_folder(entry):
                    yield start, name
                elif recursive and (path := folder / name).resolve() not in here:
                    waiting.append((path, here))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False
