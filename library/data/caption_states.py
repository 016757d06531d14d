"""The caption files of a set in columns: whether one of them may have changed since, without reading the metadata."""

import os
from array import array
from typing import NamedTuple

import numpy as np

from library.data.caption_sources import CaptionFile, is_as_recorded
from library.data.columns import Texts, TextsBuilder

_NO_RECORD = -1


class CaptionStates(NamedTuple):
    """Paths of caption files, and the size and time that the metadata records of each; -1 without record."""

    paths: Texts
    sizes: np.ndarray
    times: np.ndarray

    def may_have_changed(self, since: int) -> bool:
        """Return whether a file is gone, or has another size or time; without record, a time later than `since`."""
        for path, size, time in zip(self.paths, self.sizes.tolist(), self.times.tolist(), strict=True):
            try:
                state = os.stat(path)  # noqa: PTH116
            except (OSError, ValueError):
                return True
            recorded = None if size == _NO_RECORD else (size, time)
            if not is_as_recorded((state.st_size, state.st_mtime_ns), recorded, since):
                return True
        return False


class StatesBuilder:
    """Columns in the making: files are added one by one."""

    def __init__(self) -> None:
        self._paths = TextsBuilder()
        self._sizes, self._times = array("q"), array("q")

    def add(self, file: CaptionFile) -> None:
        """Add a file."""
        self._paths.add(file.path)
        recorded = file.recorded
        self._sizes.append(_NO_RECORD if recorded is None else recorded.size)
        self._times.append(_NO_RECORD if recorded is None else recorded.modified)

    def built(self) -> CaptionStates:
        """Return the columns; nothing may be added afterwards."""
        sizes, times = (np.frombuffer(column, np.int64) for column in (self._sizes, self._times))
        return CaptionStates(self._paths.built(), sizes, times)
