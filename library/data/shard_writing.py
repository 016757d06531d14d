"""Latents of many images to one shard: their arrays and facts, under a name that their content decides."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from library.config.atomic_files import replacing
from library.data.columns import Texts
from library.data.latent_cache import CachedLatents
from library.data.latent_shards import (
    FORMAT,
    INTERPOLATION,
    MANIFEST,
    MASK,
    NUMBERS,
    SHARD_SUFFIX,
    VAE,
    facts_checksum,
)
from library.data.stored_arrays import block_checksum
from library.sdxl.tensor_file import TensorToWrite, write_safetensors

DIGEST_BYTES = 64
SHARD_NAME = re.compile(r"\d+x\d+-[0-9a-f]{8}")
"""What `write_shard` calls its files, without the suffix: bucket and checksum."""
ROWS = 1024
"""The most images of a shard: 270 MB of latents of 1024x1024 pixels."""


class Member(NamedTuple):
    """An image of a shard."""

    key: str
    cached: CachedLatents


def write_shard(folder: Path, members: Sequence[Member], dtype: torch.dtype) -> Path:
    """Write a shard and return its path, which its content decides.

    All members have one bucket and VAE, and all or none flipped latents and a mask. Raise `UserError` if it cannot be
    written.
    """
    first = members[0].cached
    metadata = {"format": str(FORMAT), VAE: first.vae_digest or ""}
    if first.resize_interpolation is not None:
        metadata[INTERPOLATION] = first.resize_interpolation
    numbers = _numbers(members, dtype)
    facts = _facts(members, numbers)
    path = folder / f"{first.bucket}-{facts_checksum(metadata, facts):08x}{SHARD_SUFFIX}"
    tensors = {name: torch.from_numpy(column) for name, column in facts.items()} | numbers
    named = [TensorToWrite.of(name, tensor) for name, tensor in tensors.items()]
    write_safetensors(path, named, metadata)
    return path


def write_manifest(folder: Path, names: Sequence[str]) -> None:
    """Write which shards there are. Raise `UserError` if it cannot be written."""
    with replacing(folder / MANIFEST) as file:
        file.write(json.dumps({"format": FORMAT, "files": sorted(names)}, indent=2).encode())


def _numbers(members: Sequence[Member], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors of numbers, [N, 4, h, w] and [N, h, w]; masks are float32."""
    found: dict[str, torch.Tensor] = {}
    for name in NUMBERS:
        if getattr(members[0].cached, name) is not None:
            arrays = [torch.from_numpy(np.ascontiguousarray(getattr(each.cached, name))) for each in members]
            found[name] = torch.stack([each.to(torch.float32 if name == MASK else dtype) for each in arrays])
    return found


def _facts(members: Sequence[Member], numbers: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    keys = Texts.of(member.key for member in members)
    checksums = np.zeros((len(members), len(NUMBERS)), np.int64)
    for column, name in enumerate(NUMBERS):
        if name in numbers:
            bits = numbers[name].view(torch.int16 if numbers[name].dtype == torch.bfloat16 else torch.int32).numpy()
            checksums[:, column] = [block_checksum(row) for row in bits]
    each = [member.cached for member in members]
    return {
        "keys": keys.block.copy(),
        "key_ends": keys.ends.copy(),
        "original_size": np.array([cached.original_size for cached in each], np.int64),
        "crop_ltrb": np.array([cached.crop_ltrb for cached in each], np.float64),
        "resized_size": np.array([cached.resized_size or (0, 0) for cached in each], np.int64),
        "image_blake2b": _letters([cached.image_digest for cached in each]),
        "mask_blake2b": _letters([cached.mask_digest for cached in each]),
        "checksums": checksums,
    }


def _letters(texts: Sequence[str | None]) -> np.ndarray:
    column = np.array([(text or "").encode() for text in texts], f"S{DIGEST_BYTES}")
    return column.view(np.uint8).reshape(len(texts), DIGEST_BYTES)
