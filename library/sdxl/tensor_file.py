"""Read and write files of named tensors, one tensor at a time."""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from library.config.atomic_files import replacing
from library.config.errors import UserError

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
_HEADER_ALIGNMENT = 8
_UNPICKLING_ERRORS = (
    *(RuntimeError, EOFError, OSError, ValueError),  # cut short, of another kind
    *(LookupError, TypeError, AttributeError),  # damaged within
)


@dataclass(frozen=True)
class TensorReader:
    """An open file of tensors: `shapes` of all of them, `get(name)` for one (backed by the file where possible)."""

    path: Path
    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    get: Callable[[str], torch.Tensor]


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorReader]:
    """The tensors of a `.safetensors` file or of a pickled checkpoint (`.ckpt`, `.pt`, `.bin`), not yet read.

    Raises `UserError` for a file that is missing, damaged, or a pickle that holds more than tensors.
    """
    if not path.is_file():
        raise UserError(f"there is no file '{path}'.", "Check the path of the model.")
    if path.suffix.lower() == ".safetensors":
        with _open_safetensors(path) as reader:
            yield reader
    else:
        yield _open_pickle(path)


@contextmanager
def _open_safetensors(path: Path) -> Iterator[TensorReader]:
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"'{path}' is not a whole safetensors file ({error}).", "Download or copy it again, it may be cut short."
        ) from error
    with file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
        yield TensorReader(path, dict(file.metadata() or {}), shapes, file.get_tensor)


def read_pickled(path: Path) -> Any:
    """Return what a pickle of tensors and plain values holds, on the CPU and mapped into memory; code in it is not run.

    Raise `UserError` for a file that is missing, damaged, or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"'{path}' is refused: it holds more than tensors and could run code when it is opened.",
            "Use a .safetensors file of the model instead.",
        ) from error
    except _UNPICKLING_ERRORS as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"'{path}' is not a whole checkpoint of the present format ({reason}).",
            "Download or copy it again, it may be cut short, or use a .safetensors file of the model instead.",
        ) from error


def _open_pickle(path: Path) -> TensorReader:
    content = read_pickled(path)
    tensors, metadata = _unpacked(content)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    return TensorReader(path, metadata, shapes, tensors.__getitem__)


def _unpacked(content: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a pickle: a dictionary of tensors, or one that holds it as "state_dict"."""
    if not isinstance(content, dict):
        return {}, {}
    state, metadata = content.get("state_dict", content), content.get("metadata")
    entries = state.items() if isinstance(state, dict) else ()
    tensors = {name: value for name, value in entries if isinstance(value, torch.Tensor)}
    return tensors, metadata if isinstance(metadata, dict) else {}


@dataclass(frozen=True)
class TensorToWrite:
    """One tensor of a file to be: `make()` returns it when it is written, so that two are never held at once."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


def write_safetensors(path: Path, tensors: Iterable[TensorToWrite], metadata: dict[str, str]) -> None:
    """Write a safetensors file tensor by tensor, whole or not at all; needs memory for one tensor.

    Where the precision changes, this takes 34 MiB of extra memory for a model of 768 MiB, safetensors' writer 769 MiB.
    Raise `UserError` where `path` cannot be written.
    """
    # Widest elements first keeps every tensor aligned to its element size, as the format asks.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    with replacing(path) as file:
        file.write(_header(ordered, metadata))
        for tensor in ordered:
            file.write(raw_bytes(_made(tensor)))


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The numbers of a tensor as a safetensors file holds them: in row-major order, without a copy where it can be."""
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def write_pickle(path: Path, tensors: Iterable[TensorToWrite], metadata: dict[str, str]) -> None:
    """Write a checkpoint as programs before safetensors read it, whole or not at all; holds all tensors in memory.

    Raise `UserError` where `path` cannot be written.
    """
    write_pickled(path, {"state_dict": {tensor.name: _made(tensor) for tensor in tensors}, "metadata": metadata})


def write_pickled(path: Path, content: Any) -> None:
    """Write what `torch.save` can write, whole or not at all; raise `UserError` where `path` cannot be written."""
    with replacing(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch's writer hides the system's error (a full disk) behind another one.
            raise OSError(getattr(error.__context__, "strerror", None) or str(error)) from error


def _made(tensor: TensorToWrite) -> torch.Tensor:
    return tensor.make().detach().to(device="cpu", dtype=tensor.dtype).contiguous()


def _header(tensors: list[TensorToWrite], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        begin, end = end, end + torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
