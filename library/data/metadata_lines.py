"""Metadata of one JSON object a line (JSONL): an image path with its captions."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from library.config.atomic_files import replacing
from library.config.errors import UserError
from library.data.strict_json import BYTE_ORDER_MARK, exact_utf8, parse_json, shown

IMAGE_PATH = "image_path"
_REMEDY = "or, if the file is one JSON object, let its name end in .json"


def is_lines(path: Path) -> bool:
    """Return whether a metadata file is one of lines, by its suffix."""
    return path.suffix.lower() == ".jsonl"


def read_lines(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield number (from 1), image path and the rest of each line, without holding the file in memory.

    Empty lines are skipped. Raise `UserError` naming the line that is not UTF-8, not a JSON object, or has no image
    path, and for a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = exact_utf8(line, f"'{path}'", line=number).rstrip()
                if number == 1:
                    text = text.removeprefix(BYTE_ORDER_MARK)
                if text:
                    content = parse_json(text, f"'{path}'", _REMEDY, line=number)
                    yield number, *path_and_entry(content, f"'{path}', line {number}")
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}.", "Check the path.") from error


def write_lines(path: Path, metadata: Mapping[str, Mapping[str, Any]]) -> None:
    """Write one line for each entry, all or none. Raise `UserError` if `path` cannot be written."""
    with replacing(path) as file:
        file.writelines(_encoded_lines(metadata.items()))


def text_of_lines(metadata: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what `write_lines` writes."""
    return b"".join(_encoded_lines(metadata.items())).decode()


def path_and_entry(content: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Return image path and rest of an object. Raise `UserError`, naming the place `where`, if it has no path."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected an object with '{IMAGE_PATH}', got {shown(content)}.", "Correct the line.")
    image_path = content.pop(IMAGE_PATH, None)
    if not isinstance(image_path, str) or not image_path:
        raise UserError(
            f"{where}: expected '{IMAGE_PATH}' to name the image, got {shown(image_path)}.",
            "Write the path, absolute or relative to the image folder.",
        )
    return image_path, content


def _encoded_lines(entries: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[bytes]:
    for key, entry in entries:
        content = {IMAGE_PATH: key} | dict(entry) | {IMAGE_PATH: key}  # first, whatever the entry holds
        try:
            yield f"{json.dumps(content, ensure_ascii=False)}\n".encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            yield f"{json.dumps(content)}\n".encode()
