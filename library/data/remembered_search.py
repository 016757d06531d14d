"""What a search for the images of metadata has found, remembered beside it: the same search need not be made again.

It counts for the same metadata, names in the folder of images, shards and options, all compared by a digest, so that
nothing is trusted but the digest. Only a search that had nothing to warn of, and in which names decided all, is kept.
"""

import logging
import re
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from library.captions.rules import PairRules
from library.config.digests import digest, file_digest
from library.config.errors import UserError
from library.data.caption_states import CaptionStates
from library.data.columns import Texts, Variants
from library.data.image_columns import FoundImages
from library.data.latent_index import index_path
from library.data.latent_shards import MANIFEST, shards_path
from library.data.subsets import Subset
from library.images.files import digest_of_names
from library.images.kinds import readable_suffixes

log = logging.getLogger(__name__)

_FORMAT = "1"
_OURS = re.compile(r"found-[0-9a-f]{16}\.safetensors")
_MOST_KEPT = 8
"""Files of one set: for other options, or for several subsets of one metadata file."""
_KEY, _CHECKSUM = "key", "crc32"
_TEXTS = ("keys", "files", "caches", "l", "g", "notices", "captions")
_NUMBERS: dict[str, Any] = {
    "subset_of": np.dtype(np.int32),
    "buckets": np.dtype(np.int32),
    "loss_weights": np.dtype(np.float64),
    "in_shards": np.dtype(np.uint8),
    "is_regular": np.dtype(np.uint8),
    "caption_sizes": np.dtype(np.int64),
    "caption_times": np.dtype(np.int64),
    "firsts_l": np.dtype(np.int64),
    "firsts_g": np.dtype(np.int64),
}


class Remembered(NamedTuple):
    """What a search found, what it told the user, and the caption files that must still be as they were."""

    images: FoundImages
    notices: tuple[str, ...]
    captions: CaptionStates


def path_of_search(subset: Subset, is_alone: bool) -> Path | None:
    """Return where a search with these options is remembered; None if there is no file of metadata."""
    if subset.metadata_file is None or subset.dataset_class is not None:
        return None
    return index_path(subset) / f"found-{digest([_described(subset, is_alone)], 8).hex()}.safetensors"


def key_of_search(subset: Subset, is_alone: bool) -> str | None:
    """Return a digest of all that decides the search for the images of a subset with a file of metadata.

    Reads the metadata and lists the folder; return None where one of them cannot be read.
    """
    assert subset.metadata_file is not None
    try:
        content = file_digest(subset.metadata_file)
        names = digest_of_names(subset.image_dir, without=index_path(subset))
    except UserError:
        return None  # which the search explains
    shards = shards_path(subset.metadata_file) / MANIFEST
    try:
        manifest = shards.read_bytes()
    except OSError:
        manifest = b""  # there are none, or the search explains why they cannot be read
    options = _described(subset, is_alone)
    return digest([options, content.encode(), names, digest([manifest])]).hex()


def _described(subset: Subset, is_alone: bool) -> bytes:
    """Return the options that decide a search: all but those that are named here."""
    rules = subset.captions
    separators = rules.rules_l.caption_separator, rules.rules_g.caption_separator
    rest = replace(
        subset, captions=PairRules(), batch_size=1, num_repeats=1, validation_split=0.0, validation_seed=0, dataset=0
    )
    return repr((_FORMAT, rest, separators, is_alone, sorted(readable_suffixes()))).encode("utf-8", "surrogatepass")


def read_search(path: Path, subset: Subset, key: str) -> Remembered | None:
    """Return what the last search found, if the same one would find it again; a damaged file is reported."""
    assert subset.metadata_file is not None
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            if about.get(_KEY) != key:
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        if about.get(_CHECKSUM) != _checksum(arrays):
            raise ValueError("it is not as it was written")
        found = _from_arrays(arrays, subset)
        since = subset.metadata_file.stat().st_mtime_ns
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        log.warning("'%s' cannot be used (%s): the images are searched for", path, error)
        return None
    return None if found.captions.may_have_changed(since) else found


def write_search(path: Path, subset: Subset, key: str, found: Remembered) -> None:
    """Remember a search. A folder that cannot be written to is reported: the next start searches again."""
    import torch  # looking does not need it

    from library.sdxl.tensor_file import TensorToWrite, write_safetensors

    arrays = _to_arrays(found, subset)
    named = [
        TensorToWrite.of(name, torch.from_numpy(np.require(array, requirements=("C", "W"))))
        for name, array in arrays.items()
    ]
    try:
        write_safetensors(path, named, {_KEY: key, _CHECKSUM: _checksum(arrays)})
    except UserError as error:
        log.warning("what was found: %s The next start searches again.", error.problem)
        return
    _remove_oldest(path.parent)


def _remove_oldest(folder: Path) -> None:
    with suppress(OSError):  # another process has removed or opened one
        ours = [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]
        for path in sorted(ours, key=lambda path: path.stat().st_mtime_ns)[:-_MOST_KEPT]:
            path.unlink()


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    value = 0
    for name in sorted(arrays):
        value = zlib.crc32(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data, value)
    return f"{value:08x}"


def _to_arrays(found: Remembered, subset: Subset) -> dict[str, np.ndarray]:
    images, captions = found.images, found.captions
    # The keys of metadata tell nothing of these, and images whose sizes had to be read are not plain.
    assert images.own_keys is None and not len(images.masks.block) and not images.sizes.any()
    texts = (
        *(images.keys, images.files, images.caches, images.variants_l.texts, images.variants_g.texts),
        *(Texts.of(found.notices), captions.paths),
    )
    arrays: dict[str, np.ndarray] = {}
    for name, column in zip(_TEXTS, texts, strict=True):
        arrays[f"{name}_block"], arrays[f"{name}_ends"] = column.block, column.ends
    none = np.zeros(0, np.int64)
    numbers: dict[str, np.ndarray] = {
        "subset_of": images.subset_of,
        "buckets": images.buckets,
        "loss_weights": images.loss_weights,
        "in_shards": images.in_shards,
        "is_regular": np.array([each is not subset for each in images.subsets]),
        "caption_sizes": captions.sizes,
        "caption_times": captions.times,
        "firsts_l": none if images.variants_l.firsts is None else images.variants_l.firsts,
        "firsts_g": none if images.variants_g.firsts is None else images.variants_g.firsts,
    }
    return arrays | {name: np.asarray(numbers[name], dtype) for name, dtype in _NUMBERS.items()}


def _from_arrays(arrays: dict[str, np.ndarray], subset: Subset) -> Remembered:
    """Return what was remembered. Raise `KeyError` if a part is lacking; the checksum says that the rest is right."""
    keys, files, caches, texts_l, texts_g, notices, paths = (
        Texts(arrays[f"{name}_block"], arrays[f"{name}_ends"]) for name in _TEXTS
    )
    variants_l, variants_g = (
        Variants(texts, arrays[firsts] if len(arrays[firsts]) else None)
        for texts, firsts in ((texts_l, "firsts_l"), (texts_g, "firsts_g"))
    )
    regular = subset.as_regularization()
    images = FoundImages(
        [regular if is_regular else subset for is_regular in arrays["is_regular"].tolist()],
        *(arrays["subset_of"], keys, variants_l, variants_g, files, caches),
        *(arrays["buckets"], np.zeros_like(arrays["buckets"]), arrays["loss_weights"]),
        in_shards=arrays["in_shards"].astype(bool),
    )
    return Remembered(images, tuple(notices), CaptionStates(paths, arrays["caption_sizes"], arrays["caption_times"]))
