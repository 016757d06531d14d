"""sdxl_train.py itself on a GPU that is not there: memory, launches, waits and copies of its last step.

Nothing is computed. Its model has no numbers and is not saved; the tiny SDXL needs seconds, the full size a minute and
a gigabyte. Counts of operations are the same in both.
"""

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sdxl_train  # isort: skip  # before torch, since it says how torch is to take its memory
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import PartialState

from benchmarks.plain_loop import train_plainly
from benchmarks.rehearsal.books import Books
from benchmarks.rehearsal.figures import counts, names_of, snapshot
from benchmarks.rehearsal.models import MODELS, model_without_numbers
from benchmarks.rehearsal.stand_in import CUDA, stand_in_gpu
from benchmarks.synthetic_set import SyntheticSet
from library.diffusion.objective import Objective
from library.optim import kernels, triton_launches
from library.optim.stepping import Stepper
from library.sdxl import text_encoding
from library.sdxl.architecture import Architecture, SdxlModel
from library.sdxl.checkpoint_file import ModelDtypes
from library.sdxl.sizes import Size
from library.training import accelerator as accelerator_room
from library.training import setup
from library.training.card_memory import GIB, CardMemory, largest_batch
from library.training.checkpoints import Checkpoints
from library.training.learner import Learner
from library.training.precision import PrecisionOptions
from library.training.run_options import TrainingOptions
from library.training.sampling import Sampling
from library.training.step_comparison import StepComparison
from library.training.tracking import Tracker

RUN_FLAGS = (
    *("--output_name=rehearsal", "--max_data_loader_n_workers=0", "--seed=1", "--learning_rate=1e-5"),
    *("--noise_offset=0.0357", "--adaptive_noise_scale=0.00357", "--save_model_as=safetensors"),
)
"""The flags of README's command that decide neither memory nor launches."""
_LOOP, _SAMPLES = "loop", "samples"


@dataclass(frozen=True)
class Case:
    """What is rehearsed: `flags` after `RUN_FLAGS` (None: the plain loop of the bench), on images of these sizes."""

    name: str
    flags: tuple[str, ...] | None
    buckets: tuple[Size, ...] = (Size(1024, 1024),)
    num_steps: int = 2
    channels_last: bool = False
    has_triton: bool = True


def rehearse(case: Case, model_size: str) -> dict[str, Any]:
    """Return the figures of a case, from a forked process; a "note" says why there are none."""
    with tempfile.TemporaryDirectory(prefix="rehearsal_") as folder:
        path = Path(folder) / "figures.json"
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _write_figures(case, model_size, Path(folder), path)
        _, status = os.waitpid(pid, 0)
        if path.exists():
            figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return figures
        return {"note": f"exit status {os.waitstatus_to_exitcode(status)}"}


def _write_figures(case: Case, model_size: str, folder: Path, path: Path) -> None:
    """Write the figures of a case and end this process: the thread of a GPU that is not there cannot be joined."""
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        figures = _Rehearsal(case, MODELS[model_size], folder).figures()
    except BaseException as error:  # noqa: BLE001 (its text is the row of the table)
        traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        figures = {"note": f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"}
    path.write_text(json.dumps(figures), encoding="utf-8")
    os._exit(0)


class _Rehearsal:
    """One run of the trainer within a stand-in for a GPU."""

    def __init__(self, case: Case, architecture: Architecture, folder: Path):
        self._case = case
        self._architecture = architecture
        self._folder = folder
        self._model: SdxlModel | None = None
        self._learner: Learner | None = None
        self._steps: list[dict[str, Any]] = []
        self._names: dict[int, str] = {}  # of storages, also of those that a step has replaced
        self._samples: dict[str, Any] = {}
        self._before_steps = 0
        self._by_arithmetic = 0

    def figures(self) -> dict[str, Any]:
        """Run the case and return what the books say of its last step, of its samples and of what came before."""
        training_set = SyntheticSet(self._folder / "set", self._case.buckets)
        training_set.folder.mkdir()
        training_set.write()
        (self._folder / "prompts.txt").write_text("a cat --e photographic --s 2\n", encoding="utf-8")
        begun = time.process_time()
        with ExitStack() as stack:
            books = stack.enter_context(stand_in_gpu())
            if self._case.flags is None:
                self._train_plainly(training_set, books)
            else:
                for target, name, value in self._replaced(books):
                    stack.enter_context(patch.object(target, name, value))
                # Without the wrapper that turns a UserError into an exit status.
                sdxl_train.main.__wrapped__(self._argv(training_set))  # type: ignore[attr-defined]
        return {
            **self._steps[-1],
            "by_arithmetic_gib": round(self._by_arithmetic / GIB, 3),
            "before_steps_peak_gib": round(self._before_steps / GIB, 3),
            "first_step": self._steps[0],
            "samples": self._samples,
            "seconds": round(time.process_time() - begun, 1),
        }

    def _argv(self, training_set: SyntheticSet) -> list[str]:
        case, first = self._case, self._case.buckets[0]
        assert case.flags is not None
        return [
            *("--pretrained_model_name_or_path=random/sdxl", f"--in_json={training_set.metadata}"),
            *(f"--train_data_dir={training_set.images}", f"--output_dir={self._folder / 'output'}"),
            f"--max_train_steps={case.num_steps}",
            *("--dataset_repeats=100", f"--resolution={first.width},{first.height}", *RUN_FLAGS),
            *(flag.replace("{folder}", str(self._folder)) for flag in case.flags),
        ]

    def _replaced(self, books: Books) -> Iterator[tuple[Any, str, Any]]:
        """Yield what is replaced in the trainer: what would read numbers, and where phases begin and end."""
        yield accelerator_room, "make_accelerator", _on_cuda(accelerator_room.make_accelerator)
        yield PrecisionOptions, "heavy_problems", lambda _: ()  # which asks torch for a GPU
        yield setup, "check_prediction", lambda options: None  # there is no file
        yield setup, "architecture_of", lambda options: self._architecture
        yield setup, "require_card_memory", self._noting_arithmetic(setup.require_card_memory)
        yield setup, "load_model", lambda options, dtypes, *_, **__: self._load(dtypes, books)
        yield setup, "load_unet", lambda *_: None
        yield setup, "vae_digest", lambda vae: "0" * 32
        yield setup, "check_disk", lambda *_: None
        yield Checkpoints, "after_step", lambda *_: None
        yield StepComparison, "has_moved", lambda _: True
        yield kernels, "_can_compile", lambda device_type: self._case.has_triton
        yield triton_launches, "has_triton", lambda: self._case.has_triton
        for target, name, phase in (
            (text_encoding, "encode_captions", "text"),
            (Objective, "draw", "noise"),
            (Learner, "predict", "forward"),
            (Objective, "losses", "loss"),
            (Learner, "backward", "backward"),
            (Learner, "step", "end of step"),
            (Stepper, "_step_groups", "optimizer"),
            (AcceleratedOptimizer, "step", "optimizer"),  # with fp16's scaler
        ):
            yield target, name, _within(books.in_phase, phase, getattr(target, name))
        yield setup, "_make_learner", self._noting_the_learner(setup._make_learner, books)
        yield Sampling, "_draw_one", self._noting_samples(Sampling._draw_one, books)
        yield Tracker, "after_step", self._ending_steps(Tracker.after_step, books)

    def _load(self, dtypes: ModelDtypes, books: Books) -> SdxlModel:
        self._model = model_without_numbers(self._architecture, dtypes, books)
        if self._case.channels_last:
            torch.nn.Module.to(self._model.unet, memory_format=torch.channels_last)
        return self._model

    def _train_plainly(self, training_set: SyntheticSet, books: Books) -> None:
        model = self._load(ModelDtypes(), books)
        for network in model.networks:
            torch.nn.Module.to(network, CUDA)
        self._before_steps = books.peak
        books.begin()
        clock = _PlainClock(self._case.num_steps, books, lambda: self._steps.append(snapshot(books, {})))
        model.unet.register_forward_pre_hook(lambda *_: clock.enter("forward"))
        model.unet.register_forward_hook(lambda *_: clock.enter(_LOOP))
        train_plainly(model, training_set.batches(batch_size=1), CUDA, clock)  # type: ignore[arg-type]

    def _noting_arithmetic(self, require: Callable[..., CardMemory | None]) -> Callable[..., CardMemory | None]:
        def noting(options: TrainingOptions, architecture: Any, found: Any, *others: Any) -> CardMemory | None:
            memory = require(options, architecture, found, *others)
            assert memory is not None
            self._by_arithmetic = memory.total(options, largest_batch(options, found))
            return memory

        return noting

    def _noting_the_learner(self, make: Callable[..., Learner], books: Books) -> Callable[..., Learner]:
        def noting(*arguments: Any, **named: Any) -> Learner:
            self._learner = make(*arguments, **named)
            self._before_steps = books.peak
            books.phase = _LOOP
            books.begin()
            return self._learner

        return noting

    def _noting_samples(self, draw: Callable[..., None], books: Books) -> Callable[..., None]:
        def noting(*arguments: Any, **named: Any) -> None:
            books.begin()
            with books.in_phase(_SAMPLES):
                draw(*arguments, **named)
            self._samples = counts(books) | {"peak_gib": round(books.peak / GIB, 3)}
            books.begin()

        return noting

    def _ending_steps(self, after_step: Callable[..., None], books: Books) -> Callable[..., None]:
        def ending(tracker: Tracker, occasion: Any, report: Any) -> None:
            after_step(tracker, occasion, report)
            if report is not None:
                assert self._model is not None and self._learner is not None
                self._names |= names_of(books, self._model, self._learner)
                self._steps.append(snapshot(books, self._names))
            books.begin()

        return ending


class _PlainClock:
    """What the plain loop takes for the clock of the bench: it tells the books of phases and steps."""

    def __init__(self, num_steps: int, books: Books, note: Callable[[], None]):
        self.num_steps = num_steps
        self._books = books
        self._note = note
        self.enter(_LOOP)

    def enter(self, phase: str) -> None:
        """Count for this phase from here on."""
        self._books.phase = phase

    def stretch(self, name: str) -> Any:
        """Count for this phase within the block."""
        return self._books.in_phase(name)

    def end_step(self) -> None:
        """Note what the step came to."""
        self._note()
        self._books.begin()


def _within(phase: Callable[[str], Any], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def within(*arguments: Any, **named: Any) -> Any:
        with phase(name):
            return function(*arguments, **named)

    return within


def _on_cuda(make: Callable[..., Accelerator]) -> Callable[..., Accelerator]:
    """Return a function that makes an accelerator on the GPU that is not there."""

    def make_on_cuda(*arguments: Any, **named: Any) -> Accelerator:
        accelerator = make(*arguments, **named)
        accelerator.state._shared_state["device"] = CUDA
        PartialState._shared_state["device"] = CUDA
        if accelerator.mixed_precision == "fp16":  # which accelerate refused when it looked for a GPU
            accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cuda")
        assert accelerator.device == CUDA
        return accelerator

    return make_on_cuda
