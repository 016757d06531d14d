"""The entries of an index for the images that are read now: which still hold, and those that are new."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from library.data.columns import Texts
from library.data.file_states import state_of, states_of_files
from library.data.latent_cache import CachedLatents
from library.data.latent_index import (
    CONTENT_BYTES,
    ENTRY,
    SETTLED_NS,
    now_ns,
    one_writer,
    read_index,
    settled,
    with_entries,
    write_index,
)
from library.images.buckets import ALPHA, MaskSource
from library.images.crops import Crop
from library.sdxl.sizes import LATENT_CHANNELS, PIXELS_PER_LATENT, Size

_FROM_ALPHA, _FROM_FILE = 1, 2  # where a mask is from
_OF_A_KIND = ("vae", "interpolation", "has_flipped", "has_mask", "is_ours")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_ROWS_AT_ONCE = 1 << 16
States = tuple[tuple[int, int, int], tuple[int, int, int]]


def states_of(image: Path | None, mask: MaskSource | None) -> States:
    """Return the states of an image and of the file of its mask."""
    return state_of(image), state_of(mask if isinstance(mask, Path) else None)


def names_in(folder: Path, paths: Texts) -> Texts:
    """Return paths as the index names them: relative to the folder, with slashes, where they begin with it."""
    names = paths.without_start(os.path.join(folder, ""))  # noqa: PTH118
    return names if os.sep == "/" else Texts(np.where(names.block == ord(os.sep), ord("/"), names.block), names.ends)


def _taken(entries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the entries of some rows, zeros for -1; those that are mapped from a file and all wanted stay there."""
    if len(rows) == len(entries) and np.array_equal(rows, np.arange(len(rows))):
        return entries.view(np.ndarray)
    taken = np.zeros(len(rows), ENTRY)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        here = rows[start : start + _ROWS_AT_ONCE]
        there = here >= 0
        taken[start : start + len(here)][there] = entries[here[there]]
    return taken


def _distrust(trusted: np.ndarray, paths: Texts, noted: np.ndarray, asked: np.ndarray) -> None:
    """Trust no longer the entries whose file is asked for, and not in the state that is noted."""
    rows = np.flatnonzero(trusted & asked)
    trusted[rows] = states_of_files(paths if len(rows) == len(paths) else paths.take(rows)) == noted[rows]


def _alike(columns: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the rows in which all of some columns of integers have the same values, in their order, for each values."""
    hashes = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        hashes = (hashes ^ column.astype(np.uint64)) * _MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
    _, firsts, numbers = np.unique(hashes, return_index=True, return_inverse=True)
    if any((column[firsts][numbers] != column).any() for column in columns):  # two values of one hash
        _, numbers = np.unique(np.column_stack(columns), axis=0, return_inverse=True)
    if len(hashes):
        yield from np.split(np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers))[:-1])


class Entries:
    """The entries of the images of one index, in the order of the images."""

    def __init__(self, path: Path, folder: Path | None, caches: Texts, files: Texts, masks: Texts):
        """`path` is that of the index; `caches` in `folder` are named as they lie in it, `files` are their images."""
        self._path = path
        self._caches = caches
        self._files = files
        self._masks = masks
        index = read_index(path)
        self._names = caches if folder is None else names_in(folder, caches)
        at = index.rows_of(self._names)
        self._has_entry = at >= 0
        self.entries = _taken(index.entries, at)
        self._texts = {text: number for number, text in enumerate(index.texts)}
        self._is_new = np.zeros(len(caches), bool)

    def unchanged(self, places: np.ndarray, *, check_images: bool) -> np.ndarray:
        """Return which files have an entry and the size and time that it names, and so their images if checked.

        Latents whose `places` are known are in shards that are open, and not in these files.
        """
        trusted = self._has_entry & settled(self.entries)
        is_placed = places["offsets"][:, 0] > 0
        trusted &= ~is_placed | (self.entries["place"] == places)
        _distrust(trusted, self._caches, self.entries["place"]["state"], ~is_placed)
        if check_images:
            _distrust(trusted, self._files, self.entries["image"], self._files.lengths > 0)
            if len(self._masks.block):
                is_file = np.fromiter((mask not in ("", ALPHA) for mask in self._masks), bool, len(self._masks))
                _distrust(trusted, self._masks, self.entries["mask"], is_file)
        return trusted

    def kinds(self, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, CachedLatents]]:
        """Yield the rows of `chosen` entries of files of one kind, and one of these files but for its numbers.

        The files of a kind fit the same demands. They may be of images of other sizes, and cropped elsewhere.
        """
        rows, facts = np.flatnonzero(chosen), self.entries["facts"]
        columns = (facts["latents"][:, 0], facts["latents"][:, 1], *(facts[name] for name in _OF_A_KIND))
        for members in _alike([column[rows] for column in columns]):
            yield rows[members], self._cached(facts[rows[members[0]]])

    def crops(self, rows: np.ndarray | slice, *, legacy: bool) -> np.ndarray:
        """Return the crops of the images of some rows, [N, 3], as `CachedLatents.crop` returns each."""
        facts = self.entries["facts"][rows]
        crops = np.empty((len(facts), len(Crop._fields)))
        is_true = facts["resized"].any(axis=1) & (not legacy)
        resized, buckets = facts["resized"][is_true], facts["latents"][is_true] * PIXELS_PER_LATENT
        left_top = (resized - buckets) // 2  # as `true_crop_ltrb`
        crops[is_true] = np.column_stack([left_top, resized[:, 0] - buckets[:, 0] - left_top[:, 0]])
        others = np.flatnonzero(~is_true)
        sizes = np.column_stack([facts[name][others] for name in ("latents", "original", "resized")])
        columns = (*sizes.T, *facts["crop"][others].view(np.int64).T, facts["is_ours"][others])
        for members in _alike(columns):
            crops[others[members]] = self._cached(facts[others[members[0]]]).crop(legacy=legacy)
        return crops

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
        with one_writer(self._path) as is_alone:
            if is_alone:
                self._merge()

    def _merge(self) -> None:
        """Write the index as it is by now, with what is new; no other process may write it meanwhile."""
        rows = np.flatnonzero(self._is_new)
        names = [self._names[row] for row in rows.tolist()]
        entries, now = self.entries[rows], read_index(self._path)
        texts = {text: number for number, text in enumerate(now.texts)}
        for name in ("vae", "interpolation"):  # numbers of texts
            numbers = [0, *(texts.setdefault(text, len(texts)) + 1 for text in self._texts)]
            entries["facts"][name] = np.array(numbers, np.int32)[entries["facts"][name]]
        merged = with_entries(now, names, entries, list(texts))
        write_index(self._path, *merged, list(texts))
