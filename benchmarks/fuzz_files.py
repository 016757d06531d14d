"""Damage files of every kind that the scripts read, run the scripts on them, and see that each run ends well.

    python benchmarks/fuzz_files.py [--minutes 10] [--seed 0] [--num_parallel 2]

A run ends well with status 0, or with status 2 and one line that begins with `error:` (the preparation may also end
with status 1, which lists images that it could not prepare). A traceback, a crash, another status, a run that takes
longer than a bound or wants gigabytes of memory does not. The files of such runs are kept, with what they printed.
The first run of each kind gets a file without damage, and must succeed.
While the scripts run, the functions that read files are tried by themselves (`fuzz_readers`).
The figures go to benchmarks/results/fuzz_files.{json,txt}. Needs POSIX.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/


from benchmarks.damaged_bytes import damages_of, leave_whole
from benchmarks.fuzz_kinds import KINDS, Kind, make_whole_files
from benchmarks.fuzz_readers import READERS, Reading, read_damaged
from benchmarks.result_files import RESULTS, machine_line, write_result
from library.config.errors import EXIT_USER_ERROR
from tests.forked_runs import END_AT_ONCE, LIMIT_MEMORY, Command, ForkedRun, RunServer

MOST_SECONDS = 120.0
MOST_BYTES = 4 * 2**30  # of addresses, beyond what the process has when it starts
EXIT_IMAGES_LEFT = 1


@dataclass(frozen=True)
class Ending:
    """How a run on a damaged file ended; `fault` says what was wrong with that, "" if nothing was."""

    kind: str
    damage: str
    status: int
    seconds: float
    fault: str


class Fuzz:
    """Runs on damaged copies of the files in `whole`, in folders below `work`; those that end badly stay there."""

    def __init__(self, server: RunServer, whole: Path, work: Path, *, seed: int, tries_whole_files: bool):
        self._server = server
        self._whole = whole
        self._work = work
        self._chance = random.Random(seed)
        """Of the readings; those of a run depend on its number alone, so that it can be repeated."""
        self._seed = seed
        self._num_whole = len(KINDS) if tries_whole_files else 0
        self._num_begun = 0

    def endings(
        self, num_parallel: int, *, until: Callable[[int], bool], meanwhile: Callable[[], object]
    ) -> Iterator[Ending]:
        """Yield the endings of runs, `num_parallel` at a time, each kind in turn, until `until(runs begun)`.

        `meanwhile` is called again and again while they run.
        """
        running: list[_Attack] = []
        while running or not until(self._num_begun):
            while len(running) < num_parallel and not until(self._num_begun):
                running.append(self._begin(KINDS[self._num_begun % len(KINDS)]))
            for attack in [each for each in running if each.is_over()]:
                running.remove(attack)
                yield attack.ending()
            meanwhile()

    def reading(self, number: int) -> Reading:
        """Return how the reading of a damaged file ended, each reader in turn."""
        reader = READERS[number % len(READERS)]
        return read_damaged(reader, self._whole, self._work / f"reading {number}", self._chance)

    def _begin(self, kind: Kind) -> "_Attack":
        folder = self._work / f"{self._num_begun:05d}"
        is_whole = self._num_begun < self._num_whole
        self._num_begun += 1
        shutil.copytree(self._whole, folder)
        chance = random.Random(f"{self._seed} {self._num_begun}")
        target = chance.choice(sorted(path for path in folder.glob(kind.pattern) if path.is_file()))
        damage = leave_whole if is_whole else chance.choice(damages_of(target.suffix))
        target.write_bytes(damage(target.read_bytes(), chance))
        limits = {LIMIT_MEMORY: str(MOST_BYTES), END_AT_ONCE: ""}
        run = self._server.start(Command(kind.script, kind.argv(folder, target), folder / "said.txt", limits))
        return _Attack(kind, f"{damage.__name__} {target.relative_to(folder)}", folder, run, must_succeed=is_whole)


class _Attack:
    def __init__(self, kind: Kind, damage: str, folder: Path, run: ForkedRun, *, must_succeed: bool):
        self._kind = kind
        self._damage = damage
        self._folder = folder
        self._run = run
        self._must_succeed = must_succeed
        self._started = time.monotonic()

    def is_over(self) -> bool:
        return self._run.is_over() or time.monotonic() - self._started > MOST_SECONDS

    def ending(self) -> Ending:
        seconds = time.monotonic() - self._started
        if not self._run.is_over():
            self._run.kill()
            fault, status = f"not done after {MOST_SECONDS:.0f} s", -1
        else:
            status = self._run.wait()
            fault = fault_of(self._kind.script, status, self._run.said)
            if self._must_succeed and status != 0:
                fault = f"status {status} without any damage: {self._run.said.strip().splitlines()[-1][:200]}"
        if not fault:
            shutil.rmtree(self._folder)
        return Ending(self._kind.name, self._damage, status, round(seconds, 2), fault)


def fault_of(script: str, status: int, said: str) -> str:
    """Return what is wrong with how a run ended, "" if nothing is."""
    num_errors = sum(line.startswith("error:") for line in said.splitlines())
    if "Traceback" in said:
        return f"a traceback: {said.strip().splitlines()[-1][:200]}"
    if status == EXIT_USER_ERROR:
        return "" if num_errors == 1 else f"{num_errors} lines that begin with error:"
    allowed = (0, EXIT_IMAGES_LEFT) if script == "prepare" else (0,)
    if status in allowed and num_errors == 0:
        return ""
    return f"status {status}: {(said.strip().splitlines() or [''])[-1][:300]}"


def run_fuzz(minutes: float, seed: int, num_parallel: int, faulty: Path) -> dict[str, Any]:
    """Damage files for so many minutes and return all figures. What ends badly is moved to the folder `faulty`."""
    from benchmarks.ceilings import machine

    endings: list[Ending] = []
    readings: list[Reading] = []
    with RunServer() as server, tempfile.TemporaryDirectory() as folder:
        make_whole_files(Path(folder) / "whole")
        fuzz = Fuzz(server, Path(folder) / "whole", Path(folder) / "work", seed=seed, tries_whole_files=True)
        deadline = time.monotonic() + 60 * minutes
        endings += fuzz.endings(
            num_parallel,
            until=lambda _: time.monotonic() > deadline,
            meanwhile=lambda: readings.append(fuzz.reading(len(readings))),
        )
        faults = [f"{each.kind}: {each.damage}: {each.fault}" for each in endings if each.fault]
        faults += [f"{each.reader}: {each.damage}: {each.fault}" for each in readings if each.fault]
        if faults:
            shutil.copytree(Path(folder) / "work", faulty, dirs_exist_ok=True)
    return {
        "machine": machine(),
        "seed": seed,
        "minutes": minutes,
        "num_runs": len(endings),
        "num_readings": len(readings),
        "longest_run_seconds": max(ending.seconds for ending in endings),
        "longest_reading_seconds": max(reading.seconds for reading in readings),
        "kinds": {kind.name: _figures([each for each in endings if each.kind == kind.name]) for kind in KINDS},
        "readers": {
            reader.name: _figures_of_readings([each for each in readings if each.reader == reader.name])
            for reader in READERS
        },
        "faults": faults,
    }


def _figures(endings: Sequence[Ending]) -> dict[str, int]:
    statuses = Counter(ending.status for ending in endings)
    return {
        "runs": len(endings),
        "done": statuses[0],
        "refused": statuses[EXIT_USER_ERROR],
        "images_left": statuses[EXIT_IMAGES_LEFT],
        "faults": sum(bool(ending.fault) for ending in endings),
    }


def _figures_of_readings(readings: Sequence[Reading]) -> dict[str, int]:
    num_refused, num_faults = sum(each.is_refused for each in readings), sum(bool(each.fault) for each in readings)
    return {
        "readings": len(readings),
        "read": len(readings) - num_refused - num_faults,
        "refused": num_refused,
        "faults": num_faults,
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    lines = [
        machine_line(result["machine"]),
        "",
        f"{result['num_runs']} runs and {result['num_readings']} readings of damaged files in {result['minutes']:g} "
        f"minutes, seed {result['seed']}: {len(result['faults'])} ended badly",
        f"(traceback, crash, another status, over {MOST_SECONDS:.0f} s, over {MOST_BYTES / 2**30:.0f} GiB more)",
        f"the longest run took {result['longest_run_seconds']:.1f} s, the longest reading "
        f"{result['longest_reading_seconds']:.2f} s",
        "",
        f"{'file':37}{'runs':>6}{'done':>6}{'refused':>9}{'images left out':>17}{'badly':>7}",
    ]
    for name, figures in result["kinds"].items():
        counts = [figures[key] for key in ("runs", "done", "refused", "images_left", "faults")]
        lines.append(f"{name:37}{counts[0]:6}{counts[1]:6}{counts[2]:9}{counts[3]:17}{counts[4]:7}")
    lines += ["", f"{'reader':37}{'files':>6}{'read':>6}{'refused':>9}{'badly':>7}"]
    for name, figures in result["readers"].items():
        counts = [figures[key] for key in ("readings", "read", "refused", "faults")]
        lines.append(f"{name:37}{counts[0]:6}{counts[1]:6}{counts[2]:9}{counts[3]:7}")
    lines += ["", *result["faults"]]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Damage, run and write the figures; return 1 if a run ended badly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_parallel", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--faulty", type=Path, default=Path("faulty"), help="folder for the files of bad endings")
    arguments = parser.parse_args()
    result = run_fuzz(arguments.minutes, arguments.seed, arguments.num_parallel, arguments.faulty)
    write_result(arguments.results / "fuzz_files", result, table(result))
    print(table(result))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
