"""Shards: the latents of many images in one safetensors file, each known by its key and read at its offset."""

import json
import os
import struct
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from library.config.errors import UserError, listed
from library.data.columns import Texts
from library.data.file_states import state_from
from library.data.latent_cache import CacheDemands, CachedLatents, require_fitting
from library.data.latent_index import PLACE
from library.data.stored_arrays import BF16, FLOAT32, read_at
from library.data.subsets import Subset
from library.sdxl.sizes import Size

SUFFIX, SHARD_SUFFIX = ".shards", ".safetensors"
MANIFEST = "manifest.json"
FORMAT = 1
LATENTS, FLIPPED, MASK = "latents", "latents_flipped", "alpha_mask"
NUMBERS = (LATENTS, FLIPPED, MASK)
"""The tensors of numbers, in the order of the offsets of a place."""
FACTS = {
    "keys": np.dtype(np.uint8),
    "key_ends": np.dtype(np.int64),
    "original_size": np.dtype(np.int64),
    "crop_ltrb": np.dtype(np.float64),
    "resized_size": np.dtype(np.int64),
    "image_blake2b": np.dtype(np.uint8),
    "mask_blake2b": np.dtype(np.uint8),
    "checksums": np.dtype(np.int64),
}
"""What a shard holds beside the numbers: of each image its key, what its `.npz` would say, checksums of its rows."""
VAE, INTERPOLATION = "vae_blake2b", "resize_interpolation"
_DTYPES = {"F64": "<f8", "I64": "<i8", "U8": "u1"}
_KINDS = {"F32": FLOAT32, "BF16": BF16}
_BYTES = {"F32": 4, "BF16": 2}
_REMEDY = "Run prepare_buckets_latents.py with --latents_as=shards --skip_existing again."


def shards_path(metadata_file: Path) -> Path:
    """Return the folder of the shards of a metadata file: beside it."""
    return metadata_file.with_name(metadata_file.name + SUFFIX)


class Shard(NamedTuple):
    """One file: its state when it was opened, what it says of all its images, and of each."""

    path: Path
    state: tuple[int, int, int]
    metadata: Mapping[str, str]
    facts: Mapping[str, np.ndarray]
    places: np.ndarray  # of PLACE, one for each image
    shape: tuple[int, ...]  # (4, h, w)

    @property
    def keys(self) -> Texts:
        """The keys of the images, in the order of the rows."""
        return Texts(self.facts["keys"], self.facts["key_ends"])

    def read(self, row: int) -> CachedLatents:
        """Return what an `.npz` would hold. Raise `UserError` where the numbers are not those that were written."""
        place = self.places[row]
        names = [name for name, offset in zip(NUMBERS, place["offsets"].tolist(), strict=True) if offset]
        shapes = {NUMBERS.index(name): self.shape if name != MASK else self.shape[1:] for name in names}
        found = read_at(self.path, place, shapes)
        if found is None:
            raise error_of_row(self.path)
        arrays = dict(zip(names, found, strict=True))
        resized = self.facts["resized_size"][row].tolist()
        left, top, right, bottom = self.facts["crop_ltrb"][row].tolist()
        return CachedLatents(
            latents=arrays[LATENTS],
            original_size=Size(*self.facts["original_size"][row].tolist()),
            crop_ltrb=(left, top, right, bottom),
            latents_flipped=arrays.get(FLIPPED),
            alpha_mask=arrays.get(MASK),
            resized_size=Size(*resized) if any(resized) else None,
            image_digest=_text(self.facts["image_blake2b"][row]),
            vae_digest=self.metadata[VAE],
            resize_interpolation=self.metadata.get(INTERPOLATION),
            mask_digest=_text(self.facts["mask_blake2b"][row]),
        )

    def read_fitting(
        self, row: int, image: Path | None, bucket: Size | None, demands: CacheDemands
    ) -> tuple[CachedLatents, np.ndarray]:
        """Return latents and their place if they fit. Raise as `latent_cache.read_fitting`."""
        cached = self.read(row)
        require_fitting(cached, f"'{self.keys[row]}' in '{self.path}'", image, bucket, demands)
        return cached, self.places[row]


class Shards:
    """The shards of a set: rows are numbered through all files."""

    def __init__(self, folder: Path, shards: list[Shard]):
        self.folder = folder
        self.shards = shards
        self.keys = Texts.joined([shard.keys for shard in shards]) if shards else Texts.of([])
        self._firsts = np.cumsum([0, *(len(shard.places) for shard in shards)])
        hashes = _hashes(self.keys)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        again = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        pairs = [(self.keys[row], self.keys[other]) for row, other in self._order[again[:, None] + [0, 1]].tolist()]
        twice = [key for key, other in pairs if key == other]
        if twice:
            raise UserError(f"'{folder}' holds {len(twice)} images twice: {listed(twice)}.", _REMEDY)

    def rows_of(self, keys: Texts) -> np.ndarray:
        """Return the row of each key, -1 for one that is not there."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        hashes = _hashes(keys)
        at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        rows = np.where(self._hashes[at] == hashes, self._order[at], -1)
        there = np.flatnonzero(rows >= 0)
        if self.keys.take(rows[there]) != keys.take(there):  # two keys of one hash
            row_of = {key: row for row, key in enumerate(self.keys)}
            return np.fromiter((row_of.get(key, -1) for key in keys), np.int64, len(keys))
        return rows

    def files_of(self, rows: np.ndarray) -> np.ndarray:
        """Return in which file each row is, as a number of `shards`."""
        return np.searchsorted(self._firsts, rows, side="right") - 1

    def file_of(self, row: int) -> tuple[Shard, int]:
        """Return the file of a row, and which of its images that is."""
        number = int(self.files_of(np.array(row)))
        return self.shards[number], row - int(self._firsts[number])

    @cached_property
    def places(self) -> np.ndarray:
        """The place of each row, of PLACE."""
        return np.concatenate([shard.places for shard in self.shards])


def _hashes(keys: Texts) -> np.ndarray:
    """Return 64 bits of each key, which are other ones in every process."""
    return np.fromiter(map(hash, keys), np.int64, len(keys))


def error_of_row(path: Path) -> UserError:
    """Return the error of latents that are not in a shard as they were when it was opened."""
    return UserError(
        f"'{path}' is damaged, or was replaced after it was opened: latents in it are not those that were written.",
        f"Stop the run, delete the file, and run again. {_REMEDY}",
    )


def shards_of(subset: Subset) -> Shards | None:
    """Return the shards of a subset, None if it has none. Raise as `read_shards`."""
    if subset.metadata_file is None or subset.dataset_class is not None:
        return None
    return read_shards(shards_path(subset.metadata_file))


def read_shards(folder: Path) -> Shards | None:
    """Return the shards that the manifest of a folder names; None if there is no manifest.

    Raise `UserError` naming the file that is missing, cut off or damaged, and the images that are there twice.
    """
    names = read_manifest(folder)
    return None if names is None else Shards(folder, [open_shard(folder / name) for name in names])


def read_manifest(folder: Path) -> list[str] | None:
    """Return the names of the shards in a folder; None if there is no manifest."""
    path = folder / MANIFEST
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError("it is of another version of this program")
        return [str(name) for name in about["files"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read ({error}).", _REMEDY) from error


def open_shard(path: Path) -> Shard:
    """Return a shard. Raise `UserError` for one that is missing, cut off or damaged.

    Its name ends in the checksum of its facts, among which are the checksums of the latents.
    """
    try:
        with path.open("rb") as file:
            state = state_from(os.fstat(file.fileno()))
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > state[0]:
                raise ValueError("it is cut off")
            header = file.read(header_bytes)
            about, start = json.loads(header), 8 + header_bytes
            metadata = about.pop("__metadata__")
            if start + max(each["data_offsets"][1] for each in about.values()) != state[0]:
                raise ValueError("it is cut off")
            facts = {}
            for name in FACTS:
                file.seek(start + about[name]["data_offsets"][0])
                facts[name] = _column(file, about[name])
        if not path.stem.endswith(f"-{facts_checksum(metadata, facts):08x}"):
            raise ValueError("its facts are not as they were written")
        return Shard(path, state, metadata, facts, _places(about, start, state, facts), _shape(about))
    except FileNotFoundError as error:
        raise UserError(f"the shard '{path}' is missing.", f"Copy it again, or: {_REMEDY}") from error
    except (OSError, ValueError, LookupError, TypeError, struct.error, RecursionError) as error:
        raise UserError(f"the shard '{path}' cannot be used ({error}).", f"Copy it again, or: {_REMEDY}") from error


def facts_checksum(metadata: Mapping[str, str], facts: Mapping[str, np.ndarray]) -> int:
    """Return a checksum of what a shard says of its images."""
    checksum = zlib.crc32(json.dumps(dict(sorted(metadata.items()))).encode())
    for name in FACTS:
        checksum = zlib.crc32(np.ascontiguousarray(facts[name]).reshape(-1).view(np.uint8).data, checksum)
    return checksum


def _column(file: Any, about: Mapping[str, Any]) -> np.ndarray:
    begin, end = about["data_offsets"]
    return np.frombuffer(file.read(end - begin), _DTYPES[about["dtype"]]).reshape(about["shape"])


def _shape(about: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(about[LATENTS]["shape"][1:])


def _places(
    about: Mapping[str, Any], start: int, state: tuple[int, int, int], facts: Mapping[str, np.ndarray]
) -> np.ndarray:
    count = about[LATENTS]["shape"][0]
    if count != len(facts["key_ends"]) - 1:
        raise ValueError(f"it holds {count} latents of {len(facts['key_ends']) - 1} images")
    places = np.zeros(count, PLACE)
    places["state"] = state
    places["checksums"] = facts["checksums"]
    for number, name in enumerate(NUMBERS):
        if name in about:
            places["kinds"][:, number] = _KINDS[about[name]["dtype"]]
            row_bytes = int(np.prod(about[name]["shape"][1:])) * _BYTES[about[name]["dtype"]]
            places["offsets"][:, number] = start + about[name]["data_offsets"][0] + np.arange(count) * row_bytes
    return places


def _text(letters: np.ndarray) -> str | None:
    return letters.tobytes().rstrip(b"\0").decode() or None
