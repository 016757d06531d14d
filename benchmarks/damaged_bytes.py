"""Bytes of a file with something wrong in them: flipped bits, parts cut off, absurd values."""

import io
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

_HEADER_BYTES = 600
"""Where most files say what they are."""

_VALUE = re.compile(rb'-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|"[^"\\\n]{0,200}"|true|false|null')
_ABSURD = (
    *(b"-1", b"0", b"1e400", b"-1e9", b"1000000000000", b"9" * 5000, b"0.5", b"nan", b"1e-320"),
    *(b"null", b"true", b"[]", b"{}", b'""', b'"\\u0000"', b'"\\ud800"', b'"' + b"a" * 100_000 + b'"'),
    *(b"[[[1]]]", b"[" * 20_000, b"[" * 3000 + b"]" * 3000, b'{"a":' * 3000 + b"1" + b"}" * 3000),
)
_LENGTH_BYTES = 8  # of a safetensors header

Damage = Callable[[bytes, random.Random], bytes]


def leave_whole(whole: bytes, chance: random.Random) -> bytes:
    """Return the bytes as they are, for a run that must succeed."""
    return whole


def flip_bits(whole: bytes, chance: random.Random) -> bytes:
    """Flip one to eight bits, in half of the cases all near the beginning."""
    data = bytearray(whole)
    within = min(len(data), _HEADER_BYTES) if chance.random() < 0.5 else len(data)
    for _ in range(chance.randint(1, 8) if within else 0):
        data[chance.randrange(within)] ^= 1 << chance.randrange(8)
    return bytes(data)


def cut_short(whole: bytes, chance: random.Random) -> bytes:
    """Keep the first part: anything from no byte to all but one."""
    near = [0, 1, min(_HEADER_BYTES, len(whole)), len(whole) // 2, len(whole) - 1]
    return whole[: max(0, chance.choice([*near, chance.randrange(len(whole) + 1)]))]


def replace_part(whole: bytes, chance: random.Random) -> bytes:
    """Replace up to 4096 bytes by zeros, by random bytes, or by another part of the file."""
    begin = chance.randrange(len(whole) + 1)
    size = chance.choice([1, 16, 512, 4096])
    other = chance.randrange(len(whole) + 1)
    filling = [bytes(size), chance.randbytes(size), whole[other : other + size], b""]
    return whole[:begin] + chance.choice(filling) + whole[begin + size :]


def absurd_value(text: bytes, chance: random.Random) -> bytes:
    """Replace a number, a string or a word of JSON or TOML by one that makes no sense."""
    places = list(_VALUE.finditer(text))
    if not places:
        return chance.choice(_ABSURD)
    place = chance.choice(places)
    return text[: place.start()] + chance.choice(_ABSURD) + text[place.end() :]


def absurd_header(whole: bytes, chance: random.Random) -> bytes:
    """Put an absurd value into the header of a safetensors file, with the right length before it."""
    end = _LENGTH_BYTES + int.from_bytes(whole[:_LENGTH_BYTES], "little")
    header = absurd_value(whole[_LENGTH_BYTES:end], chance)
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header + whole[end:]


def absurd_content(whole: bytes, chance: random.Random) -> bytes:
    """Put something absurd in the place of one value or tensor of a pickle, or take that out."""
    content = torch.load(io.BytesIO(whole), weights_only=True)
    container, key = chance.choice(list(_places(content)))
    if chance.random() < 0.2:
        del container[key]
    else:
        container[key] = chance.choice(_STRANGERS)
    written = io.BytesIO()
    torch.save(content, written)
    return written.getvalue()


_STRANGERS: tuple[Any, ...] = (
    *(None, True, -1, 10**12, 10**400, float("nan"), float("inf"), "", "a" * 100_000, [], {}, (), {"a": {"a": 1}}),
    *(torch.zeros(()), torch.zeros(3, 5), torch.zeros(0), torch.ones(2, dtype=torch.int8), torch.full((4,), torch.nan)),
    *(torch.ones(1).expand(10**12), torch.ones(2, device="meta"), torch.ones(3).to_sparse()),
)


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Return containers and keys of all that is in the dictionaries and lists of `content`."""
    found: list[tuple[Any, Any]] = []
    waiting = [content]
    while waiting:
        container = waiting.pop()
        if isinstance(container, dict | list):
            keys = container.keys() if isinstance(container, dict) else range(len(container))
            found += [(container, key) for key in keys]
            waiting += [container[key] for key in keys]
    return found


BINARY: Sequence[Damage] = (flip_bits, cut_short, replace_part)
TEXT: Sequence[Damage] = (*BINARY, absurd_value, absurd_value, absurd_value)
SAFETENSORS: Sequence[Damage] = (*BINARY, absurd_header, absurd_header)
PICKLE: Sequence[Damage] = (*BINARY, absurd_content, absurd_content)


def damages_of(suffix: str) -> Sequence[Damage]:
    """Return what can be done to files with this suffix."""
    if suffix in (".json", ".toml", ".txt", ".caption"):
        return TEXT
    if suffix in (".ckpt", ".pt"):
        return PICKLE
    return SAFETENSORS if suffix == ".safetensors" else BINARY
