"""The runs that the studio has open: found below the folders of its command line, and nowhere else."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import platformdirs

from library.config.digests import digest
from library.config.errors import UserError
from library.runs.files import span_of
from library.runs.folders import FoundRun, RunFolders
from library.runs.presets import EXAMPLES
from library.runs.watch import RunWatch
from library.samples.contact_sheet import Samples
from library.samples.picture_files import SAMPLE_FOLDER
from library.samples.sample_index import SampleIndex
from studio.opened import APP_NAME
from studio.pictures import Pictures

_MOST_WATCHED = 16
_OUTSIDE = "Start the studio with --run_dirs or --model_dirs for a folder that holds it."


class Runs:
    """Runs below `roots`; what a run reads may lie below `readable` too."""

    def __init__(self, roots: Sequence[Path], readable: Sequence[Path] = ()):
        self.folders = RunFolders(roots)
        self.pictures = Pictures(platformdirs.user_cache_path(APP_NAME) / "thumbnails", newest_first=False)
        self._writable = [root.resolve() for root in roots]
        self._readable = [*self._writable, *(folder.resolve() for folder in (*readable, EXAMPLES))]
        self._watched: OrderedDict[str, RunWatch] = OrderedDict()
        self._indices: dict[Path, SampleIndex] = {}
        self._pictures: dict[str, dict[str, Path]] = {}
        self._lock = threading.Lock()
        self.closing: list[Callable[[], None]] = []
        """What else is to be ended with it."""

    def start(self) -> None:
        """Remove old thumbnails, in a thread."""
        threading.Thread(target=self.pictures.tidy, name="old thumbnails", daemon=True).start()

    def close(self) -> None:
        """End what works in the background; the runs go on."""
        self.pictures.close()
        for close in self.closing:
            close()

    # -- places ----------------------------------------------------------------------------------------------------

    def may_read(self, path: Path) -> bool:
        """Return whether a path lies below the folders that were opened, links followed."""
        return _is_below(path, self._readable)

    def may_write(self, path: Path) -> bool:
        """Return whether a path lies below the folders of runs, links followed."""
        return _is_below(path, self._writable)

    def require_writable(self, path: Path, what: str) -> None:
        """Raise `UserError` for a path at which the studio must not write."""
        if not self.may_write(path):
            raise UserError(f"{what} lies outside of the folders of runs.", "Start the studio with --run_dirs for it.")

    # -- runs ------------------------------------------------------------------------------------------------------

    def run(self, run_id: str) -> FoundRun:
        """Return a run. Raise `UserError` if there is none of this id."""
        found = self.folders.run(run_id)
        if found is None or not self.may_read(found.output_dir):
            raise UserError("this run is not here: its folder may be gone.", "Look at the list of runs again.")
        return found

    def watch(self, run: FoundRun) -> tuple[RunWatch, list[str]]:
        """Return what reads the curves of a run, and what is to be said of them."""
        folder = None if run.record is None or run.record.log_folder is None else Path(run.record.log_folder)
        notes = []
        if run.record is not None and folder is None:
            notes.append("this run writes no curves: --logging_dir asks for them.")
        if folder is not None and not self.may_read(folder):
            notes.append(f"its curves lie outside of the opened folders, in '{folder}'. {_OUTSIDE}")
            folder = None
        with self._lock:
            watch = self._watched.get(run.id)
            if watch is None or watch.log_folder != folder:
                watch = self._watched[run.id] = RunWatch(folder)
            self._watched.move_to_end(run.id)
            if len(self._watched) > _MOST_WATCHED:
                self._watched.popitem(last=False)
        problem = watch.refresh()
        return watch, [*notes, *([problem] if problem else [])]

    # -- samples ---------------------------------------------------------------------------------------------------

    def samples(self, run: FoundRun) -> Samples:
        """Return the samples of a run, by prompt and step."""
        return {} if run.record is None else self.index(run).samples(run.output_name or "", self._span(run))

    def grids(self, run: FoundRun) -> dict[int, Path]:
        """Return the grids of a run, by step."""
        return {} if run.record is None else self.index(run).grids(run.output_name, self._span(run))

    def index(self, run: FoundRun) -> SampleIndex:
        """Return what knows the sample images in the folder of a run."""
        folder = run.output_dir / SAMPLE_FOLDER
        with self._lock:
            return self._indices.setdefault(folder, SampleIndex(folder))

    def picture_id(self, run: FoundRun, path: Path) -> str:
        """Return under which id an image of a run is known to the page."""
        found = digest([str(path).encode(errors="surrogatepass")], 8).hex()
        self._pictures.setdefault(run.id, {})[found] = path
        return found

    def picture(self, run_id: str, picture_id: str) -> Path | None:
        """Return the file of an image; None if there is none that may be shown."""
        if picture_id not in self._pictures.get(run_id, {}):
            run = self.folders.run(run_id)
            if run is None:
                return None
            for path in (
                *self.grids(run).values(),
                *(each for of in self.samples(run).values() for each in of.values()),
            ):
                self.picture_id(run, path)
            run_id = run.id
        file = self._pictures.get(run_id, {}).get(picture_id)
        return file if file is not None and file.is_file() and self.may_read(file) else None

    def _span(self, run: FoundRun) -> tuple[datetime, datetime]:
        assert run.record is not None
        return span_of(run.record, run.records)


def _is_below(path: Path, folders: Sequence[Path]) -> bool:
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, or no path at all
        return False
    return any(resolved.is_relative_to(folder) for folder in folders)
