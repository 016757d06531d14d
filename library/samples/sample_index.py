"""The samples of a folder that is looked at again and again: what each file says is read once."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from library.config.errors import UserError
from library.samples.contact_sheet import Samples, find_samples, texts_of
from library.samples.picture_files import find_grids


class SampleIndex:
    """The sample images in a folder."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._read: dict[Path, tuple[tuple[int, int], Mapping[str, str] | None]] = {}

    def samples(self, model: str, span: tuple[datetime, datetime]) -> Samples:
        """Return the images of a run by prompt and step; none before the first is drawn."""
        try:
            return find_samples(self._folder, model, span, self.texts)
        except UserError:
            return {}

    def grids(self, model: str | None, span: tuple[datetime, datetime]) -> dict[int, Path]:
        """Return the grids of each L prompt with each G prompt, by step."""
        return find_grids(self._folder, model, *span)

    def texts(self, path: Path) -> Mapping[str, str] | None:
        """Return the texts of a file; None for one that cannot be read, or is gone."""
        try:
            found = path.stat()
        except OSError:
            return None
        version = found.st_size, found.st_mtime_ns
        known = self._read.get(path)
        if known is None or known[0] != version:
            known = self._read[path] = version, texts_of(path)
        return known[1]

    def left_out(self) -> list[str]:
        """Return the names of files that are no samples: they cannot be read, or do not say how they were drawn."""
        read = list(self._read.items())  # other threads read on
        unused = [path for path, (_, texts) in read if texts is None or "training_step" not in texts]
        return [path.name for path in unused if path.exists()]
