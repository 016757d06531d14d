"""Digests: short numbers that tell whether bytes have changed, the same on every machine."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from library.config.errors import UserError

DIGEST_BYTES = 16


def digest(parts: Iterable[bytes | memoryview], num_bytes: int = DIGEST_BYTES) -> bytes:
    """Return the BLAKE2b digest of `parts` joined without separators, `num_bytes` (1-64) long."""
    hasher = hashlib.blake2b(digest_size=num_bytes)
    for part in parts:
        hasher.update(part)
    return hasher.digest()


class WrittenDigest:
    """The digest of a file while it is written: a thread computes it as the same bytes go to the disk."""

    def __init__(self) -> None:
        self._hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)

    def watching(self, file: BinaryIO) -> "WatchedFile":
        """Return what to write to in place of `file`, from its beginning to its end."""
        return WatchedFile(file, self._hasher)

    def hex(self) -> str:
        """Return the digest of all that was written, in hexadecimal."""
        return self._hasher.hexdigest()


class WatchedFile:
    """A file opened for writing, whose bytes are hashed on their way."""

    def __init__(self, file: BinaryIO, hasher: "hashlib._Hash | hashlib.blake2b"):
        self._file = file
        self._hasher = hasher
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="digest")

    def write(self, data: bytes | memoryview) -> int:
        """Write `data` and return the number of bytes."""
        if len(data) < _PIECE:
            self._hasher.update(data)
            return self._file.write(data)
        hashed = self._thread.submit(self._hasher.update, data)
        try:
            return self._file.write(data)
        finally:
            hashed.result()  # the memory of `data` may be used again

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()


class DigestAbreast:
    """The digest of a file that is being read from its beginning to its end: a thread follows whoever reads it.

    The bytes come from the disk once: the system still holds them when the second of the two asks. A context manager.
    """

    def __init__(self, path: Path):
        self._file = path.open("rb", buffering=0)
        self._hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="digest")
        self._following: Future[None] | None = None

    def __enter__(self) -> "DigestAbreast":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        self._file.close()

    def advance(self, num_bytes: int) -> None:
        """Follow by `num_bytes` that were just read; wait for what is behind more than that."""
        if self._following is not None:
            self._following.result()
        self._following = self._thread.submit(self._hash, num_bytes)

    def hex(self) -> str:
        """Return the digest of the whole file in hexadecimal. Raise `OSError` where it cannot be read."""
        self.advance(-1)
        assert self._following is not None
        self._following.result()
        return self._hasher.hexdigest()

    def _hash(self, num_bytes: int) -> None:
        """Hash the next `num_bytes`, or with a negative number all that is left."""
        while num_bytes != 0:
            data = self._file.read(_PIECE if num_bytes < 0 else min(_PIECE, num_bytes))
            if not data:
                return
            self._hasher.update(data)
            num_bytes -= len(data) if num_bytes > 0 else 0


_PIECE = 2**20


def file_digest(path: Path) -> str:
    """Return the digest of a file's bytes in hexadecimal. Raise `UserError` if the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}.", "Check the file.") from error
