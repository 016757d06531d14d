"""The captions to clean, from files beside images or from metadata, and what cleaning them changes on the disk."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from library.annotation.cleaning_rules import Cleaned
from library.annotation.pending_images import caption_file
from library.annotation.tag_texts import joined_tags, split_tags
from library.config.errors import UserError, error_of_errors, listed
from library.data.metadata import (
    COLUMN_G,
    COLUMN_L,
    TAGS,
    CaptionColumn,
    Entry,
    Metadata,
    key_of_caption,
    read_metadata,
    text_of_metadata,
    write_metadata,
)
from library.data.metadata_lines import is_lines, text_of_lines
from library.data.strict_json import exact_utf8
from library.editing.caption_places import Place, read_place
from library.editing.undo_journal import Change
from library.images.files import find_images

log = logging.getLogger(__name__)

JOURNAL = "captions-undo.jsonl"


class Captions(NamedTuple):
    """What one image has for both encoders: `own` is cleaned, tags are moved to `other` (empty: it has none)."""

    name: str
    own: tuple[str, ...]
    other: tuple[str, ...]


def column_of(encoder: str) -> CaptionColumn:
    """Return where the captions of "l" or "g" are."""
    return {"l": COLUMN_L, "g": COLUMN_G}[encoder]


def other_column(column: CaptionColumn) -> CaptionColumn:
    """Return where the captions of the other encoder are."""
    return COLUMN_G if column is COLUMN_L else COLUMN_L


class CaptionFiles:
    """The caption files of a folder of images. The undo journal stands in that folder."""

    def __init__(self, folder: Path, extension: str, other_extension: str, *, recursive: bool):
        self._folder = folder.absolute()  # the journal is read from anywhere
        self._contents: dict[Path, bytes | None] = {}
        self._files: dict[str, tuple[Path, Path]] = {}
        for image in find_images(self._folder, recursive=recursive):
            files = caption_file(image, extension), caption_file(image, other_extension)
            self._files[files[0].relative_to(self._folder).as_posix()] = files

    @property
    def journal(self) -> Path:
        """The undo journal of the folder."""
        return self._folder / JOURNAL

    @property
    def folders(self) -> set[Path]:
        """The folders in which files are written."""
        return {own.parent for own, _ in self._files.values()}

    def read(self, *, with_other: bool) -> list[Captions]:
        """Return the captions that are there. Raise one `UserError` for all files that cannot be read."""
        captions, errors, missing = [], [], []
        for name, files in self._files.items():
            try:
                own, other = self._text(files[0]), self._text(files[1]) if with_other else None
            except UserError as error:
                errors.append(error)
                continue
            if own is None:
                missing.append(f"'{name}'")
            else:
                captions.append(Captions(name, (own,), () if other is None else (other,)))
        if errors:
            raise error_of_errors("caption files cannot be read", errors)
        if missing:
            log.info("%d images have no caption file and are left out: %s", len(missing), listed(missing))
        return captions

    def changes(self, cleaned: Mapping[str, Cleaned]) -> list[Change]:
        """Return what is to be written for these captions, which were read before."""
        changes = []
        for name, each in cleaned.items():
            for file, texts in zip(self._files[name], (each.own, each.other), strict=True):
                before = self._contents.get(file)
                # A file that is made ends as those of the captioners do.
                after = "".join(texts) if before is not None else "".join(f"{text}\n" for text in texts)
                if texts and after.encode() != before:
                    changes.append(Change(Place(file), before, after.encode()))
        return changes

    def _text(self, file: Path) -> str | None:
        content = self._contents[file] = read_place(Place(file))
        return None if content is None else exact_utf8(content, f"'{file}'")


class CaptionEntries:
    """The captions of a metadata file. The undo journal stands beside it."""

    def __init__(self, path: Path, column: CaptionColumn, separator: str):
        self._path = path.absolute()
        self._columns = column, other_column(column)
        self._separator = separator
        self._metadata: Metadata = read_metadata(path)

    @property
    def journal(self) -> Path:
        """The undo journal of the metadata file."""
        return self._path.with_name(f"{self._path.name}-undo.jsonl")

    @property
    def folders(self) -> set[Path]:
        """The folder of the file."""
        return {self._path.parent}

    def read(self, *, with_other: bool) -> list[Captions]:
        """Return the captions that are there."""
        captions, missing = [], []
        for name, entry in self._metadata.items():
            key, other_key = (key_of_caption(entry, column) for column in self._columns)
            if key is None:
                missing.append(f"'{name}'")
                continue
            other = () if other_key is None or not with_other else self._texts(entry, other_key)
            captions.append(Captions(name, self._texts(entry, key), other))
        if missing:
            log.info("%d images have no caption and are left out: %s", len(missing), listed(missing))
        return captions

    def changes(self, cleaned: Mapping[str, Cleaned]) -> list[Change]:
        """Return what is to be written into the file. Raise `UserError` if that could not be undone to the byte."""
        self._require_own_form()
        changes = []
        for name, each in cleaned.items():
            for column, texts in zip(self._columns, (each.own, each.other), strict=True):
                key = key_of_caption(self._metadata[name], column) or column.metadata_key
                value = self._metadata[name].get(key)
                before = None if value is None else "\n".join([value] if isinstance(value, str) else value)
                after = "\n".join(texts)
                if texts and after != before:
                    contents = (None if each is None else _encoded(each) for each in (before, after))
                    changes.append(Change(Place(self._path, name, key), *contents))
        return changes

    def write_elsewhere(self, cleaned: Mapping[str, Cleaned], out_json: Path) -> None:
        """Write the metadata with these captions into another file. Raise `UserError` if there is one already."""
        if out_json.exists():
            raise UserError(f"'{out_json}' exists already and is not overwritten.", "Name another --out_json.")
        for name, each in cleaned.items():
            for column, texts in zip(self._columns, (each.own, each.other), strict=True):
                if texts:
                    self._set(self._metadata[name], column, texts)
        write_metadata(out_json, self._metadata)

    def _require_own_form(self) -> None:
        """Refuse a file that this project did not write: all of it would change its form."""
        text = (text_of_lines if is_lines(self._path) else text_of_metadata)(self._metadata)
        if any(map(_has_lists_of_own, self._metadata.values())) or self._path.read_bytes() != text.encode():
            raise UserError(
                f"'{self._path}' is in a form that an undo could not restore to the byte: another program wrote it, or "
                "a caption in a list has several lines.",
                "Name a new file with --out_json; this one then stays as it is.",
            )

    def _texts(self, entry: Entry, key: str) -> tuple[str, ...]:
        value = entry[key]
        if isinstance(value, str):
            return (value,)
        return (joined_tags(value, self._separator),) if key == TAGS else tuple(value)

    def _set(self, entry: Entry, column: CaptionColumn, texts: tuple[str, ...]) -> None:
        key = key_of_caption(entry, column) or column.metadata_key
        if not isinstance(entry.get(key), list):
            [entry[key]] = texts
        else:
            entry[key] = split_tags(texts[0], self._separator) if key == TAGS else list(texts)


def _has_lists_of_own(entry: Entry) -> bool:
    """Return whether an entry has a list of tags, or of captions of which one has several lines."""
    captions = (entry.get(column.metadata_key) for column in (COLUMN_L, COLUMN_G))
    several_lines = any(isinstance(each, list) and any("\n" in text for text in each) for each in captions)
    return several_lines or isinstance(entry.get(TAGS), list)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")
