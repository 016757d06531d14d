"""Run sdxl_train.py and write the duration and the peak memory of each of its phases.

    python benchmarks/phases.py figures.json [flags of sdxl_train.py]

The trainer is not changed: this process wraps the functions of the phases, and a thread reads the anonymous memory of
the process (that which the system cannot drop and read again from a file) every 20 ms.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

STARTED_VARIABLE = "PHASES_STARTED"
"""Environment variable: the `time.time()` at which the caller started this process."""


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this benchmark needs Linux")


class PhaseRecorder:
    """Seconds (also of the processor) and peak memory of named phases of a run; each time a phase runs is a row."""

    def __init__(self) -> None:
        self.started = float(os.environ.get(STARTED_VARIABLE, time.time()))
        self.rows: list[dict[str, Any]] = []
        self._peaks: dict[int, int] = {}
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the block as one row."""
        token = len(self.rows)
        row: dict[str, Any] = {"phase": name, "from_start_s": round(time.time() - self.started, 2)}
        self.rows.append(row)
        self._peaks[token] = anonymous_bytes()
        begin, processor = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            row["seconds"] = round(time.perf_counter() - begin, 2)
            row["processor_s"] = round(time.process_time() - processor, 2)
            row["processor_from_start_s"] = round(time.process_time(), 2)
            row["peak_gib"] = round(self._peaks.pop(token) / 2**30, 2)

    def wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Return `function`, recorded as phase `name` at each call."""

        def recorded(*arguments: Any, **named: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **named)

        return recorded

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            now = anonymous_bytes()
            for token, peak in list(self._peaks.items()):
                self._peaks[token] = max(peak, now)


def main() -> int:
    """Train with the flags of the command line, then write the rows."""
    recorder = PhaseRecorder()
    with recorder.phase("import"):
        import sdxl_train
        from library.sdxl import text_encoding
        from library.training import setup
        from library.training.checkpoints import Checkpoints
        from library.training.learner import Learner
        from library.training.sampling import Sampling
    setup.find_training_images = recorder.wrapped(setup.find_training_images, "find images")
    setup.report_captions = recorder.wrapped(setup.report_captions, "report captions")
    setup.load_model = recorder.wrapped(setup.load_model, "load")
    setup.load_unet = recorder.wrapped(setup.load_unet, "load U-Net")
    setup.prepare_set = recorder.wrapped(setup.prepare_set, "read training set")
    setup.make_plan = recorder.wrapped(setup.make_plan, "plan steps")
    setup.header_maker = recorder.wrapped(setup.header_maker, "make header")
    setup.place_networks = recorder.wrapped(setup.place_networks, "place networks")
    setup.make_learner = recorder.wrapped(setup.make_learner, "build optimizer")
    text_encoding.encode_captions = recorder.wrapped(text_encoding.encode_captions, "step begins: encode captions")
    Learner.step = recorder.wrapped(Learner.step, "optimizer step")  # type: ignore[method-assign]
    Sampling._draw_one = recorder.wrapped(Sampling._draw_one, "sample image")  # type: ignore[method-assign]
    Checkpoints._save = recorder.wrapped(Checkpoints._save, "save")  # type: ignore[method-assign]
    with recorder.phase("whole run"):
        status = sdxl_train.main(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps(recorder.rows, indent=1), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
