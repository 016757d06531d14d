"""Several processes train as one: to the same bits where sums of two are concerned."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import BUCKET_FLAGS, RATE, PreparedSet, base_flags
from tests.forked_runs import ForkedRun
from tests.outcome import differences, outcome_of

pytestmark = pytest.mark.trains


class Runs:
    """Runs of one set of flags in different numbers of processes; each accumulates what the others share."""

    def __init__(self, argv: list[str], folder: Path, start: Callable[..., list[ForkedRun]]):
        self._argv = argv
        self._start = start
        self.folder = folder

    def start(self, name: str, num_processes: int, *flags: str, **environment: str) -> list[ForkedRun]:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        paths = f"--output_dir={folder / 'output'}", f"--logging_dir={folder / 'logs'}"
        return self._start(num_processes, [*self._argv, *paths, *flags], **environment)

    def run(self, name: str, num_processes: int, *flags: str, **environment: str) -> None:
        """A run to its end, which is a good one."""
        for each in self.start(name, num_processes, *flags, **environment):
            assert each.wait() == 0, each.said

    def outcome(self, name: str) -> dict:
        return outcome_of(self.folder / name / "output", self.folder / name / "logs")

    def output(self, name: str) -> Path:
        return self.folder / name / "output"


@pytest.fixture
def runs(tiny_sdxl: Path, prepared_set: PreparedSet, tmp_path: Path, run_processes) -> Runs:
    argv = [
        *base_flags(tiny_sdxl, prepared_set.latents_json, prepared_set.images, tmp_path)[:-1],
        *("--output_name=m", "--resolution=128,128", "--seed=7", "--max_data_loader_n_workers=0", "--flip_aug"),
        *("--max_train_steps=3", f"--learning_rate={RATE}", "--max_grad_norm=0", *BUCKET_FLAGS),
    ]
    return Runs(argv, tmp_path, run_processes)


def two_are_one(runs: Runs, *flags: str) -> None:
    runs.run("one", 1, *flags, "--gradient_accumulation_steps=2")
    runs.run("two", 2, *flags)
    assert differences(runs.outcome("one"), runs.outcome("two")) == []


SGD = ("--optimizer_type=torch.optim.SGD",)
NOISE = (
    *("--noise_offset=0.1", "--noise_offset_random_strength", "--multires_noise_iterations=4", "--ip_noise_gamma=0.1"),
    *("--ip_noise_gamma_random_strength", "--stratified_timesteps"),
)


def test_two_processes_train_as_one_that_accumulates_bit_for_bit(runs: Runs):
    two_are_one(runs, *SGD, *NOISE)
