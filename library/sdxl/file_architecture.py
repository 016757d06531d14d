"""The sizes of the networks that a single file holds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from library.config.errors import UserError
from library.sdxl.architecture import ARCHITECTURE_KEY, BUILDING_ERRORS, SDXL_BASE, Architecture
from library.sdxl.tensor_file import TensorReader, first_line, open_tensors


def architecture_of_file(path: Path) -> Architecture:
    """Return the sizes of a single file's networks. Raise `UserError` for a file that is damaged."""
    with open_tensors(path) as file, _explained_architecture(file):
        return _recorded_architecture(file, SDXL_BASE)


def without_weights(reader: TensorReader, make: Callable[[Architecture], Any], otherwise: Architecture) -> Any:
    """Return what `make` builds of the architecture that the file records, of `otherwise` if it records none."""
    with _explained_architecture(reader):
        return make(_recorded_architecture(reader, otherwise))


def _recorded_architecture(reader: TensorReader, otherwise: Architecture) -> Architecture:
    note = reader.metadata.get(ARCHITECTURE_KEY)
    return otherwise if note is None else Architecture.from_json(note)


@contextmanager
def _explained_architecture(reader: TensorReader) -> Iterator[None]:
    """Within the block, what the libraries raise for sizes with which nothing can be built becomes a `UserError`."""
    try:
        yield
    except BUILDING_ERRORS as error:
        raise UserError(
            f"'{reader.path}': the metadata key '{ARCHITECTURE_KEY}' does not hold four configurations of SDXL "
            f"({first_line(error)}).",
            "Write the file again with the program that made it.",
        ) from error
