"""A run that is asked to stop, to save, or to go on from its last state, by whoever watches it."""

from pathlib import Path
from typing import Any

from library.config.errors import UserError
from library.runs.folders import STARTING, FoundRun
from library.training.progress import LATEST, newest_state
from library.training.request_files import make_request
from library.training.run_record import ELSEWHERE, FINISHED, RUNS
from library.training.stopping import SAVE_FILE, STOP_FILE

_GOES_ON = (RUNS, STARTING, ELSEWHERE)
_NOT_REPEATED = frozenset({"config_file", "output_config", "resume", "dry_run", "dry_run_report", "plot_schedule"})


def stop(run: FoundRun) -> None:
    """Ask a run to save and end after its step; one that is not at its first step yet ends without a save.

    Raise `UserError` if it has ended, `CannotWrite` if it cannot be asked.
    """
    if run.state == STARTING:
        process = run.launches[-1].start.process()
        if process is not None:
            process.terminate()
        return
    _require_goes_on(run)
    make_request(run.output_dir, run.output_name, STOP_FILE)


def save_now(run: FoundRun) -> None:
    """Ask a run for a model and a state after its step. Raise as `stop` does."""
    if run.state == STARTING:
        raise UserError("the run is not at its first step yet.", "Wait until it trains.")
    _require_goes_on(run)
    make_request(run.output_dir, run.output_name, SAVE_FILE)


def options_of_run(run: FoundRun) -> dict[str, Any]:
    """Return the options of a run as TOML has them, to start another like it into the same folder."""
    options = run.launches[-1].options if run.record is None else run.record.options
    kept = {name: value for name, value in options.items() if name not in _NOT_REPEATED}
    return {**kept, "output_dir": str(run.output_dir)}


def options_to_resume(run: FoundRun) -> dict[str, Any]:
    """Return the options that continue a run from its newest state. Raise `UserError` if that is not possible."""
    if run.state in _GOES_ON:
        raise UserError("the run has not ended.", "Stop it first.")
    if run.state == FINISHED:
        raise UserError("the run has finished.", "Set a larger --max_train_steps and --resume latest to train longer.")
    if state_to_resume(run) is None:
        raise UserError("the run has left no state.", "Start it again from the beginning.")
    return {**options_of_run(run), "resume": LATEST}


def state_to_resume(run: FoundRun) -> Path | None:
    """Return the state from which a run that has ended can go on."""
    return None if run.state in _GOES_ON else newest_state(run.output_dir, run.output_name)


def _require_goes_on(run: FoundRun) -> None:
    if run.state not in _GOES_ON:
        raise UserError(f"the run has ended: {run.state}.", "Resume it, or start it again.")
