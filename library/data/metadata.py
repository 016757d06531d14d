"""The metadata file: one JSON object that maps the key of each image to its captions and its training size."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.atomic_files import write_text
from library.config.errors import UserError
from library.sdxl.sizes import Size

Entry = dict[str, Any]
Metadata = dict[str, Entry]

TRAIN_RESOLUTION = "train_resolution"


@dataclass(frozen=True)
class CaptionColumn:
    """Where the captions of one text encoder are: the metadata key, and the suffix of caption files."""

    letter: str
    metadata_key: str
    caption_extension: str


COLUMN_L = CaptionColumn("L", "captionL", ".txt")
COLUMN_G = CaptionColumn("G", "captionG", ".caption")


def read_metadata(path: Path) -> Metadata:
    """Return the checked entries of a metadata file, including their unknown keys.

    Raise `UserError` naming file, image key and what was expected: for a file that cannot be read or is not UTF-8 (a
    byte-order mark is fine), broken JSON, a key that occurs twice in one object, and values of the wrong kind.
    """
    try:
        content = json.loads(
            read_utf8(path, if_missing="Check the path, or make it with the merge scripts of finetune/."),
            object_pairs_hook=_object_without_repeated_keys,
        )
    except json.JSONDecodeError as error:
        raise UserError(
            f"'{path}' is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}.",
            "Correct the line, or remove the file and run the merge scripts again.",
        ) from error
    except (RecursionError, ValueError) as error:  # thousands of brackets, a number of thousands of digits
        raise UserError(f"'{path}' is not metadata ({error}).", "Run the merge scripts again.") from error
    except _RepeatedKey as error:
        raise UserError(
            f"'{path}': the key {error} occurs twice in one object.", "Remove or rename one of the two."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}': expected an object of image keys, got {_shown(content)}.", "Pass a metadata file.")
    for key, entry in content.items():
        _check_entry(entry, where=f"'{path}', image '{key}'")
    return content


def write_metadata(path: Path, metadata: Mapping[str, Entry]) -> None:
    """Write `metadata` as JSON, whole or not at all: indent 2, non-ASCII characters unescaped.

    Lone surrogates, which UTF-8 cannot encode, stay escaped. Raise `UserError` if `path` cannot be written.
    """
    text = json.dumps(metadata, indent=2, ensure_ascii=False)
    write_text(path, re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text) + "\n")


def caption_l(entry: Entry) -> str:
    """Return the caption for encoder L. Raise `KeyError` where there is none; an empty caption is one."""
    caption: str = entry[COLUMN_L.metadata_key]
    return caption


def caption_g(entry: Entry) -> str:
    """Return the caption for encoder G. Raise `KeyError` where there is none; an empty caption is one."""
    caption: str = entry[COLUMN_G.metadata_key]
    return caption


def keys_without_caption(metadata: Mapping[str, Entry], column: CaptionColumn) -> list[str]:
    """Return the keys of the entries that have no caption in `column`; an empty one is a caption."""
    return [key for key, entry in metadata.items() if column.metadata_key not in entry]


def train_resolution(entry: Entry) -> Size | None:
    """Return the bucket that was chosen for the image; None before buckets were prepared."""
    return Size(*entry[TRAIN_RESOLUTION]) if TRAIN_RESOLUTION in entry else None


def with_train_resolution(entry: Entry, size: Size) -> Entry:
    """Return a copy of `entry` with its bucket."""
    return {**entry, TRAIN_RESOLUTION: list(size)}


def read_utf8(path: Path, if_missing: str = "Check the path.") -> str:
    """Return the text without a byte-order mark, line ends as "\\n"."""
    try:
        return path.read_text(encoding="utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"'{path}' is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}.", "Save it as UTF-8."
        ) from error
    except OSError as error:
        remedy = if_missing if isinstance(error, FileNotFoundError) else "Check the path."
        raise UserError(f"cannot read '{path}': {error.strerror or error}.", remedy) from error


class _RepeatedKey(Exception):
    pass


def _object_without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _RepeatedKey(f"'{key}'")
        result[key] = value
    return result


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object of captions, got {_shown(entry)}.", "Correct the entry.")
    for key in (COLUMN_L.metadata_key, COLUMN_G.metadata_key):
        if not isinstance(entry.get(key, ""), str):
            raise UserError(f"{where}: expected {key} to be text, got {_shown(entry[key])}.", "Correct the caption.")
    if TRAIN_RESOLUTION in entry and not _is_size(entry[TRAIN_RESOLUTION]):
        raise UserError(
            f"{where}: expected {TRAIN_RESOLUTION} to be [width, height] in pixels,"
            f" got {_shown(entry[TRAIN_RESOLUTION])}.",
            "Correct it, or prepare the buckets again.",
        )


def _is_size(value: Any) -> bool:
    # An exact type: True is an int for isinstance.
    return isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."
