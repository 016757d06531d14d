"""The caption files of a set in columns: whether one of them may have changed since, without reading the metadata."""

from array import array
from typing import NamedTuple

import numpy as np

from library.data.caption_sources import CaptionFile
from library.data.columns import Texts, TextsBuilder
from library.data.file_states import states_of_files

_NO_RECORD = -1


class CaptionStates(NamedTuple):
    """Paths of caption files, and the size and time that the metadata records of each; -1 without record."""

    paths: Texts
    sizes: np.ndarray
    times: np.ndarray

    def may_have_changed(self, since: int) -> bool:
        """Return whether a file is gone, or has another size or time; without record, a time later than `since`."""
        states = states_of_files(self.paths)
        has_record = self.sizes != _NO_RECORD
        is_recorded = (states["size"] == self.sizes) & (states["modified"] == self.times)
        is_there = states["size"] >= 0
        return not (is_there & np.where(has_record, is_recorded, states["modified"] <= since)).all()


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
