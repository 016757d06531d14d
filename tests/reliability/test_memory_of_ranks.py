"""A process of several that runs out of memory: all end, and what was learnt is saved or named."""

import pytest

from library.training.progress import newest_state, read_progress
from tests.forked_runs import NO_MEMORY_AT, ForkedRun
from tests.reliability.conftest import Runs
from tests.reliability.test_shards import FSDP

pytestmark = [pytest.mark.slow, pytest.mark.trains]


@pytest.fixture
def ended(runs: Runs, run_server, free_port):
    """`ended(3, call)`: the processes of a run, of which the second has no memory at a call; the first one first."""

    def run(number: int, call: str, *flags: str, **environment: str) -> list[ForkedRun]:
        shared = {**environment, "WORLD_SIZE": str(number), "PORT": str(free_port())}
        argv = [*runs.argv, f"--output_dir={runs.folder}", "--max_train_steps=50", *flags]
        processes = [
            run_server("train", argv, RANK=str(rank), LOCAL_RANK=str(rank), END_AT_ONCE="1", **shared, **missing)
            for rank, missing in enumerate([{}, {NO_MEMORY_AT: call}, *([{}] * (number - 2))])
        ]
        assert [each.wait(timeout=600) for each in processes] == [1] * number, [each.said for each in processes]
        return processes

    return run


def line_of(process: ForkedRun) -> str:
    """The one line with which a process ends."""
    assert "Traceback" not in process.said
    [line] = [line for line in process.said.splitlines() if "error: " in line]
    return line


MEMORY = "process 1: error: this machine is out of memory (RuntimeError: "
LOST = "error: another process of this run has ended or cannot be reached"


@pytest.mark.parametrize(
    ("place", "num_steps"),
    [("2 diffusers:UNet2DConditionModel.forward", 1), ("2 library.training.learner:Learner.step", 2)],
    ids=["forward", "step"],
)
def test_with_ddp_the_main_process_saves_the_last_step_it_has_done(place: str, num_steps: int, ended, runs: Runs):
    """A state of the step before is not said to be that of this one: the gradients had been exchanged."""
    main, full = ended(2, place, "--save_state", "--save_every_n_steps=1")
    assert MEMORY in line_of(full)
    state = newest_state(runs.folder, "m")
    assert line_of(main).startswith(LOST)
    assert line_of(main).endswith(
        f'All that was learnt in {num_steps} steps is saved; continue with --resume "{state}"'
    )
    assert state is not None and read_progress(state).step == num_steps


@pytest.mark.parametrize("number", [2, 3])
def test_with_fsdp_the_last_whole_state_is_named(number: int, ended, runs: Runs):
    place = "2 diffusers:UNet2DConditionModel.forward"
    main, full, *others = ended(number, place, "--save_state", "--save_every_n_steps=1", **FSDP)
    assert MEMORY in line_of(full)
    assert line_of(main).startswith(LOST)
    assert line_of(main).endswith(f'--resume "{newest_state(runs.folder, "m")}"')
    assert [each.said for each in others] == [""] * (number - 2), "what all miss is said once"


@pytest.mark.parametrize("shared", [{}, FSDP], ids=["DDP", "FSDP2"])
def test_memory_that_is_short_before_the_first_step_ends_all(shared: dict[str, str], ended):
    main, full, other = ended(3, "1 library.training.setup:load_unet", **shared)
    assert MEMORY in line_of(full)
    assert line_of(main).startswith(LOST)
    assert other.said == ""
