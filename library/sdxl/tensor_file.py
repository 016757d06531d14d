"""Read and write files of named tensors, one tensor at a time."""

import hashlib
import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from library.config.atomic_files import replacing
from library.config.digests import WatchedFile, WrittenDigest
from library.config.errors import UserError

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""Types of numbers as safetensors files name them."""

_LENGTH_BYTES = 8  # of the header, before it
_HEADER_ALIGNMENT = 8
_NO_HASH = f"0x{'0' * 64}"
"""Stands for the hash of the weights in the header until they are written."""
_LONGEST_REASON = 300  # characters
_READING_ERRORS = (SafetensorError, OSError, ValueError, OverflowError, MemoryError)
_UNPICKLING_ERRORS = (
    *(RuntimeError, EOFError, OSError, ValueError),  # cut short, of another kind; RecursionError is a RuntimeError
    *(LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, MemoryError),  # damaged within
)


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, shortened if necessary, or its type if it has none."""
    line = str(error).partition("\n")[0]
    return (line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}…") or type(error).__name__


@dataclass(frozen=True)
class TensorReader:
    """An open file of tensors: `get(name)` returns one, backed by the file where possible.

    `shapes` and `dtypes` are those of all of them; types of numbers have the names of safetensors ("F16").
    """

    path: Path
    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    get: Callable[[str], torch.Tensor]


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorReader]:
    """Open the tensors of a `.safetensors` file or of a pickled checkpoint (`.ckpt`, `.pt`, `.bin`), not yet read.

    A file of another name (`.sft`, or none of a hub's cache) is either, by its first bytes.
    Raise `UserError` for a file that is missing, damaged, or a pickle that holds more than tensors.
    """
    if not path.is_file():
        raise UserError(f"there is no file '{path}'.", "Check the path of the model.")
    if path.suffix.lower() == ".gguf":
        raise UserError(f"'{path}' is quantised (GGUF).", "Use a .safetensors file of the model in float16 or float32.")
    if path.suffix.lower() == ".safetensors" or _begins_as_safetensors(path):
        with _open_safetensors(path) as reader:
            yield reader
    else:
        yield _open_pickle(path)


def _begins_as_safetensors(path: Path) -> bool:
    """Return whether a file begins with the length of a header that fits into it, and the header's brace."""
    try:
        with path.open("rb") as file:
            beginning = file.read(_LENGTH_BYTES + 1)
        size = path.stat().st_size
    except OSError:  # which reading it explains
        return False
    return beginning[_LENGTH_BYTES:] == b"{" and int.from_bytes(beginning[:_LENGTH_BYTES], "little") < size


@contextmanager
def _open_safetensors(path: Path) -> Iterator[TensorReader]:
    with ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
            dtypes = {name: each.get_dtype() for name, each in slices.items()}
            metadata = dict(file.metadata() or {})
        except _READING_ERRORS as error:
            raise UserError(
                f"'{path}' is not a whole safetensors file ({first_line(error)}).",
                "Download or copy it again, it may be cut short.",
            ) from error
        yield TensorReader(path, metadata, shapes, dtypes, partial(_tensor_of, file, path))


def _tensor_of(file: Any, path: Path, name: str) -> torch.Tensor:
    try:
        tensor: torch.Tensor = file.get_tensor(name)
    except _READING_ERRORS as error:
        raise UserError(
            f"'{path}': the tensor {name} cannot be read ({first_line(error)}).", "Download or copy the file again."
        ) from error
    return tensor


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
        raise UserError(
            f"'{path}' is not a whole checkpoint of the present format ({first_line(error)}).",
            "Download or copy it again, it may be cut short, or use a .safetensors file of the model instead.",
        ) from error


def _open_pickle(path: Path) -> TensorReader:
    content = read_pickled(path)
    tensors, metadata = _unpacked(content)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    dtypes = {name: _DTYPE_NAMES.get(value.dtype, str(value.dtype)) for name, value in tensors.items()}
    return TensorReader(path, metadata, shapes, dtypes, tensors.__getitem__)


def _unpacked(content: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a pickle: a dictionary of tensors, or one with them as "state_dict".

    Sparse, quantised and empty-handed ("meta") tensors are left out, and so are metadata that are not text.
    """
    if not isinstance(content, dict):
        return {}, {}
    state, metadata = content.get("state_dict", content), content.get("metadata")
    entries = state.items() if isinstance(state, dict) else ()
    notes = metadata.items() if isinstance(metadata, dict) else ()
    return (
        {name: value for name, value in entries if isinstance(name, str) and _is_plain(value)},
        {name: value for name, value in notes if isinstance(name, str) and isinstance(value, str)},
    )


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


class DoesNotFit(UserError):
    """A number is too large for the precision of a file, in which it would be infinite."""


@dataclass(frozen=True)
class TensorToWrite:
    """One tensor of a file to be: `make()` returns it when it is written, so that two are never held at once."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> "TensorToWrite":
        """Return a tensor that is written as it is held in memory."""
        return cls(name, tuple(tensor.shape), tensor.dtype, tensor.detach)


Replacing = Callable[[nn.Module, str], torch.Tensor | None]
"""Returns what is written in place of a network's tensor of this name, None where nothing replaces it."""


def written(replacing: Replacing | None, network: nn.Module, name: str, held: torch.Tensor) -> torch.Tensor:
    """Return the tensor to write under the name of one that is held in memory."""
    replacement = None if replacing is None else replacing(network, name)
    return held if replacement is None else replacement


def write_safetensors(
    path: Path,
    tensors: Iterable[TensorToWrite],
    metadata: dict[str, str],
    digest: WrittenDigest | None = None,
    *,
    hash_key: str | None = None,
) -> None:
    """Write a safetensors file tensor by tensor, whole or not at all; holds one tensor in memory.

    A change of precision costs 34 MiB of extra memory for 768 MiB of weights, and 769 MiB with safetensors' own writer,
    which takes all tensors in their final precision. With `hash_key` the metadata hold, under this key, the SHA-256 of
    the tensors' bytes, which a thread computes as they are written; there is no `digest` then, which would be that of
    the file before. Raise `UserError` if `path` cannot be written, `DoesNotFit` if it cannot hold a number.
    """
    assert digest is None or hash_key is None
    if hash_key is not None:
        metadata = metadata | {hash_key: _NO_HASH}
    # Widest elements first keeps every tensor aligned to its element size, as the format asks.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    with replacing(path) as opened:
        header = _header(ordered, metadata)
        hasher = hashlib.sha256()
        file = opened if digest is None else digest.watching(opened)
        file.write(header)
        content = file if hash_key is None else WatchedFile(opened, hasher)
        for tensor in ordered:
            content.write(raw_bytes(_made(tensor, path)))
        if hash_key is not None:
            opened.seek(header.index(f'"{hash_key}":"{_NO_HASH}"'.encode()) + len(f'"{hash_key}":"'))
            opened.write(f"0x{hasher.hexdigest()}".encode())


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the numbers of a tensor as a safetensors file holds them: in row-major order, copied only if necessary."""
    if not tensor.numel():  # torch has no view of nothing
        return memoryview(b"")
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def write_pickle(path: Path, tensors: Iterable[TensorToWrite], metadata: dict[str, str]) -> None:
    """Write a pickled checkpoint, whole or not at all; holds all tensors in memory.

    Raise `UserError` if `path` cannot be written.
    """
    write_pickled(path, {"state_dict": {tensor.name: _made(tensor, path) for tensor in tensors}, "metadata": metadata})


def write_pickled(path: Path, content: Any, digest: WrittenDigest | None = None) -> None:
    """Write what `torch.save` can write, whole or not at all. Raise `UserError` if `path` cannot be written."""
    with replacing(path) as file:
        try:
            torch.save(content, file if digest is None else digest.watching(file))  # type: ignore[arg-type]
        except RuntimeError as error:
            # torch's writer hides the system's error (a full disk) behind another one.
            raise OSError(getattr(error.__context__, "strerror", None) or str(error)) from error


def _made(tensor: TensorToWrite, path: Path) -> torch.Tensor:
    """Return the numbers to be written. Raise `DoesNotFit` if the precision of the file makes some of them infinite."""
    held = tensor.make().detach()
    made = held.to(device="cpu", dtype=tensor.dtype).contiguous()
    if tensor.dtype.is_floating_point and torch.finfo(tensor.dtype).max < torch.finfo(held.dtype).max:
        num_lost = int((made.isinf() & held.isfinite().to("cpu")).sum()) if made.isinf().any() else 0
        if num_lost:
            precision = str(tensor.dtype).removeprefix("torch.")
            raise DoesNotFit(
                f"'{path}' is not written: {num_lost} of {made.numel()} numbers of '{tensor.name}' are too large for "
                f"{precision}, which ends at {torch.finfo(tensor.dtype).max:.5g}.",
                "Save with --save_precision=bf16 or --save_precision=float.",
            )
    return made


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
    # Half of a surrogate pair, from a caption or the name of a file, becomes "?": nobody could read it, and no model is
    # lost for a note about it.
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors="replace")
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
