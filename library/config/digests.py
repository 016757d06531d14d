"""Digests: short numbers that tell whether bytes have changed, the same on every machine."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from library.config.errors import UserError

DIGEST_BYTES = 16


def digest(parts: Iterable[bytes | memoryview], num_bytes: int = DIGEST_BYTES) -> bytes:
    """Return the BLAKE2b digest of `parts` joined without separators, `num_bytes` (1-64) long."""
    hasher = hashlib.blake2b(digest_size=num_bytes)
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def file_digest(path: Path) -> str:
    """Return the digest of a file's bytes in hexadecimal. Raise `UserError` if the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}.", "Check the file.") from error
