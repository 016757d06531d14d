"""Kill runs inside writes and at random moments, restart them until they are done, and compare the outcome.

    python benchmarks/kill_runs.py [--num_kills 100] [--seed 0] [--settings plain "kahan with Lion"]

Each round trains the tiny SDXL in one of the settings, saving model and state after every step; the plain one prepares
latents first. Every process is killed by SIGKILL and started again with --skip_existing or --resume latest. Half of the
kills are aimed at a write: the folder is watched, and a temporary file that appears is the signal. The others come just
before a random file operation, or after a random time. What is left at the end is compared, bit for bit, with a run
that nobody disturbed. The result goes to benchmarks/results/kill_runs_settings.{json,txt}. Needs POSIX.
"""

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

from benchmarks.kill_experiment import SETTINGS, CannotRun, KillExperiment
from benchmarks.result_files import RESULTS, machine_line, write_result
from tests.forked_runs import RunServer


class Experiments:
    """The settings, each made ready when it is first asked for; those that do not run here are in `unable`."""

    def __init__(self, server: RunServer, folder: Path, num_steps: int):
        self._server = server
        self._folder = folder
        self._num_steps = num_steps
        self.able: dict[str, KillExperiment] = {}
        self.unable: dict[str, str] = {}

    def get(self, name: str) -> KillExperiment | None:
        """Return a setting with its undisturbed outcome; None if it does not run here."""
        if name in self.unable or name in self.able:
            return self.able.get(name)
        folder = self._folder / name
        folder.mkdir()
        try:
            self.able[name] = KillExperiment(self._server, folder, num_steps=self._num_steps, setting=SETTINGS[name])
        except CannotRun as error:
            self.unable[name] = str(error)
            print(f"{name} does not run here: {error}", flush=True)
            return None
        print(f"{name}: undisturbed in {self.able[name].seconds:.0f} s", flush=True)
        return self.able[name]


def run_kills(
    num_kills: int, minutes: float, seed: int, num_steps: int, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Run rounds of kills, setting by setting, until there are `num_kills` or time is up; yield the figures so far."""
    from benchmarks.ceilings import machine

    chance = random.Random(seed)
    kills: list[dict[str, str]] = []
    rounds: list[dict[str, Any]] = []
    started = time.monotonic()
    with RunServer() as server, tempfile.TemporaryDirectory() as folder:
        experiments = Experiments(server, Path(folder), num_steps)
        for name in itertools.cycle(names):
            passed = (time.monotonic() - started) / 60
            if len(kills) >= num_kills or passed > minutes or len(experiments.unable) == len(names):
                return
            experiment = experiments.get(name)
            if experiment is None:
                continue
            killed, different = experiment.killed_round(f"round {len(rounds) + 1}", chance)
            rounds.append({"setting": name, "kills": [vars(kill) for kill in killed], "differences": different})
            kills += rounds[-1]["kills"]
            print(f"round {len(rounds)}, {name}: {len(killed)} kills, differences: {different or 'none'}", flush=True)
            yield {
                "machine": machine(),
                "seed": seed,
                "num_steps": num_steps,
                "minutes": round((time.monotonic() - started) / 60, 1),
                "num_kills": len(kills),
                "kills_by_phase": dict(Counter(f"{kill['script']}: {kill['phase']}" for kill in kills).most_common()),
                "things_compared": {each: len(able.expected) for each, able in experiments.able.items()},
                "settings_that_do_not_run": experiments.unable,
                "num_rounds_that_differ": sum(bool(each["differences"]) for each in rounds),
                "rounds": rounds,
            }


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    rounds = result["rounds"]
    lines = [
        machine_line(result["machine"]),
        "",
        f"{result['num_kills']} kills in {len(rounds)} rounds of training ({result['num_steps']} steps), "
        f"seed {result['seed']}, {result['minutes']} minutes",
        f"{result['num_rounds_that_differ']} rounds differ from the undisturbed one of their setting in any of "
        f"{min(result['things_compared'].values())} to {max(result['things_compared'].values())} things: models, "
        "states, images, curves, latents, metadata",
        "",
    ]
    for name in result["things_compared"]:
        own = [each for each in rounds if each["setting"] == name]
        num_kills = sum(len(each["kills"]) for each in own)
        lines.append(f"{num_kills:5} kills in {len(own):2} rounds   {name}")
    lines += [f"      does not run here: {name}" for name in result["settings_that_do_not_run"]]
    lines += ["", *(f"{count:5} kills hit   {phase}" for phase, count in result["kills_by_phase"].items()), ""]
    lines += [
        f"round {number}: {each['setting']}, {len(each['kills'])} kills, "
        f"{', '.join(each['differences']) or 'bit for bit the same'}"
        for number, each in enumerate(rounds, start=1)
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Kill, compare and write the figures; return 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=60, help="begin no round after this time")
    parser.add_argument("--num_steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="kill_runs_settings", help="name of the files of figures")
    arguments = parser.parse_args()
    num_differ = 0
    for result in run_kills(
        arguments.num_kills, arguments.minutes, arguments.seed, arguments.num_steps, arguments.settings
    ):
        write_result(arguments.results / arguments.name, result, table(result))  # what is known by now
        num_differ = result["num_rounds_that_differ"]
    return 1 if num_differ else 0


if __name__ == "__main__":
    sys.exit(main())
