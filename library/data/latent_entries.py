"""The entries of an index for the images that are read now: which still hold, and those that are new."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from library.data.columns import Texts
from library.data.latent_cache import CachedLatents
from library.data.latent_index import (
    CONTENT_BYTES,
    ENTRY,
    SETTLED_NS,
    now_ns,
    read_index,
    settled,
    with_entries,
    write_index,
)
from library.data.stored_arrays import state_from
from library.images.buckets import ALPHA, MaskSource
from library.sdxl.sizes import LATENT_CHANNELS, Size

_FROM_ALPHA, _FROM_FILE = 1, 2  # where a mask is from
ABSENT = (-1, -1, 0)
"""The state of a file that is not there."""


def state_of(path: Path | str | None) -> tuple[int, int, int]:
    """Return the state of a file, as `state_from` does; `ABSENT` of one that is not there."""
    try:
        state = os.stat(path) if path else None  # noqa: PTH116
    except OSError:
        state = None
    return ABSENT if state is None else state_from(state)


States = tuple[tuple[int, int, int], tuple[int, int, int]]


def states_of(image: Path | None, mask: MaskSource | None) -> States:
    """Return the states of an image and of the file of its mask."""
    return state_of(image), state_of(mask if isinstance(mask, Path) else None)


def names_in(folder: Path, paths: Texts) -> Texts:
    """Return paths as the index names them: relative to the folder, with slashes, where they begin with it."""
    start = os.path.join(folder, "")  # noqa: PTH118
    return Texts.of(path.removeprefix(start).replace(os.sep, "/") for path in paths)


class Entries:
    """The entries of the images of one index, in the order of the images."""

    def __init__(self, path: Path, folder: Path | None, caches: Texts, files: Texts, masks: Texts):
        """`path` is that of the index; `caches` in `folder` are named as they lie in it, `files` are their images."""
        self._path = path
        self._caches = caches
        self._files = files
        self._masks = masks
        self._index = read_index(path)
        self._names = caches if folder is None else names_in(folder, caches)
        at = self._index.rows_of(self._names)
        self._has_entry = at >= 0
        self.entries = np.zeros(len(caches), ENTRY)
        self.entries[self._has_entry] = self._index.entries[at[self._has_entry]]
        self._texts = {text: number for number, text in enumerate(self._index.texts)}
        self._is_new = np.zeros(len(caches), bool)

    def unchanged(self, places: np.ndarray, *, check_images: bool) -> np.ndarray:
        """Return which files have an entry and the size and time that it names, and so their images if checked.

        Latents whose `places` are known are in shards that are open, and not in these files.
        """
        trusted = self._has_entry & settled(self.entries)
        is_placed = places["offsets"][:, 0] > 0
        trusted &= ~is_placed | (self.entries["place"] == places)
        columns = (
            trusted.tolist(),
            is_placed.tolist(),
            self.entries["place"]["state"].tolist(),
            self.entries["image"].tolist(),
            self._caches,
            self._files,
        )
        for row, (is_known, in_shard, state, image_state, cache, file) in enumerate(zip(*columns, strict=True)):
            if is_known:
                trusted[row] = (in_shard or state_of(cache) == state) and (
                    not check_images or not file or state_of(file) == image_state
                )
        self._distrust_masks(trusted, check_images=check_images)
        return trusted

    def _distrust_masks(self, trusted: np.ndarray, *, check_images: bool) -> None:
        if not check_images or not len(self._masks.block):
            return
        for row, mask in enumerate(self._masks):
            if mask not in ("", ALPHA) and trusted[row]:
                trusted[row] = state_of(mask) == self.entries["mask"][row].item()

    def groups(self, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, CachedLatents]]:
        """Yield the rows of `chosen` entries with the same facts, and what a file of these facts holds but numbers."""
        rows = np.flatnonzero(chosen)
        facts = np.ascontiguousarray(self.entries["facts"][rows])
        as_bytes = facts.view(np.dtype((np.void, facts.dtype.itemsize)))
        _, inverse = np.unique(as_bytes, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        for members in np.split(order, np.cumsum(np.bincount(inverse))[:-1]) if len(rows) else []:
            yield rows[members], self._cached(facts[members[0]])

    def _cached(self, facts: np.void) -> CachedLatents:
        width, height = facts["latents"].tolist()
        numbers = np.broadcast_to(np.float32(1), (LATENT_CHANNELS, height, width))
        resized, texts = facts["resized"].tolist(), list(self._texts)
        left, top, right, bottom = facts["crop"].tolist()
        return CachedLatents(
            latents=numbers,
            original_size=Size(*facts["original"].tolist()),
            crop_ltrb=(left, top, right, bottom),
            latents_flipped=numbers if facts["has_flipped"] else None,
            alpha_mask=numbers[0] if facts["has_mask"] else None,
            mask_digest="" if facts["has_mask"] == _FROM_FILE else None,
            resized_size=Size(*resized) if any(resized) else None,
            image_digest="" if facts["is_ours"] else None,
            vae_digest=texts[facts["vae"] - 1] if facts["vae"] else None,
            resize_interpolation=texts[facts["interpolation"] - 1] if facts["interpolation"] else None,
        )

    def note(
        self,
        row: int,
        cached: CachedLatents,
        place: np.ndarray | None,
        states: States | None,
        *,
        is_own: bool = False,
    ) -> None:
        """Note what a file holds, and the states of its image and mask; None if these were not compared with it.

        A file that `is_own` was written by this process just now: nobody else can have written it in the same moment.
        """
        contents = [(each or "").encode() for each in (cached.content_digest, cached.mask_digest)]
        if place is None or max(map(len, contents)) > CONTENT_BYTES:
            return
        entry = self.entries[row]
        entry["place"] = place
        if states is None:
            return
        facts = entry["facts"]
        facts["latents"] = cached.latents.shape[2], cached.latents.shape[1]
        facts["original"], facts["resized"] = cached.original_size, cached.resized_size or (0, 0)
        facts["crop"] = cached.crop_ltrb
        facts["vae"], facts["interpolation"] = map(self._number_of, (cached.vae_digest, cached.resize_interpolation))
        facts["has_flipped"] = cached.latents_flipped is not None
        facts["has_mask"] = (cached.alpha_mask is not None) * (
            _FROM_ALPHA if cached.mask_digest is None else _FROM_FILE
        )
        facts["is_ours"] = cached.is_ours
        entry["image"], entry["mask"] = states
        entry["content"], entry["mask_content"] = contents
        entry["seen"] = now_ns()
        if is_own and max(modified for _, modified, _ in states) < now_ns() - SETTLED_NS:
            entry["seen"] += SETTLED_NS + 1
        self._is_new[row] = True

    def _number_of(self, text: str | None) -> int:
        return 0 if text is None else self._texts.setdefault(text, len(self._texts)) + 1

    @property
    def texts(self) -> list[str]:
        """The texts that the entries number."""
        return list(self._texts)

    def save(self) -> None:
        """Write what is new into the index, as it is by now."""
        if not self._is_new.any():
            return
        rows = np.flatnonzero(self._is_new)
        names = [self._names[row] for row in rows.tolist()]
        entries, now = self.entries[rows], read_index(self._path)
        texts = {text: number for number, text in enumerate(now.texts)}
        for name in ("vae", "interpolation"):  # numbers of texts
            numbers = [0, *(texts.setdefault(text, len(texts)) + 1 for text in self._texts)]
            entries["facts"][name] = np.array(numbers, np.int32)[entries["facts"][name]]
        merged = with_entries(now, names, entries, list(texts))
        write_index(self._path, *merged, list(texts))
