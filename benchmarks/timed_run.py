"""One row of a table of training steps: a timed run of the real trainer, or of the plain loop.

The trainer is not changed: hooks tell the clock where the parts of a step begin and end. Its model is random instead of
loaded and is not saved. An optimizer step within the backward pass counts as backward pass.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import sdxl_train  # isort: skip  # before torch, since it says how torch is to take its memory
import torch
from torch import nn

from benchmarks.ceilings import machine, measure
from benchmarks.plain_loop import train_plainly
from benchmarks.random_model import forward_flops, random_model
from benchmarks.step_clock import StepClock
from benchmarks.synthetic_set import SyntheticSet
from demo.random_sdxl import TINY
from library.config.errors import UserError
from library.diffusion.noise import NoisyLatents
from library.optim.options import ADAFACTOR_RECIPE
from library.sdxl.architecture import SDXL_BASE, SdxlModel
from library.sdxl.checkpoint_file import ModelDtypes
from library.sdxl.sizes import PIXELS_PER_LATENT, Size
from library.training import setup
from library.training.checkpoints import Checkpoints
from library.training.learner import Learner, StepReport
from library.training.plan import Occasion
from library.training.tracking import Tracker

ARCHITECTURES = {"full": SDXL_BASE, "tiny": TINY}
MANY_REPEATS = 1000  # so that no epoch ends while it is measured

RECIPE = (
    *("--full_bf16", "--mixed_precision=bf16", "--save_precision=bf16", "--save_model_as=safetensors"),
    *("--output_name=bench", "--max_data_loader_n_workers=0", "--cache_latents", "--cache_latents_to_disk"),
    *("--learning_rate=1e-5", "--max_grad_norm=0.0", "--noise_offset=0.0357", "--adaptive_noise_scale=0.00357"),
    *("--seed=1", "--optimizer_type=Adafactor", *ADAFACTOR_RECIPE.split(), "weight_decay=0.01"),
)
"""The training command of README without paths, samples and gradient checkpointing."""


@dataclass(frozen=True)
class Plan:
    """One run. `flags` are passed to the trainer after `RECIPE`; None is the plain loop. Sizes are in pixels.

    `forward_flops` are those of the U-Net for one image, bucket by bucket.
    """

    variant: str
    flags: tuple[str, ...] | None
    batch_size: int
    buckets: tuple[Size, ...]
    device: str
    model_size: str
    num_warm_up: int
    num_measured: int
    channels_last: bool
    forward_flops: tuple[int, ...] = ()


# -- each of these runs in a separate process --------------------------------------------------------------------------


def write_ceilings(device_name: str, model_size: str, buckets: Sequence[Size], path: Path) -> None:
    """Write the machine, its ceilings and the FLOP of a forward pass in each bucket to `path`."""
    ceilings = measure(torch.device(device_name), torch.bfloat16)
    found = {
        "machine": machine(),
        "matmul_flops": ceilings.matmul_flops,
        "copy_bytes_per_second": ceilings.copy_bytes_per_second,
        "forward_flops": {str(bucket): forward_flops(ARCHITECTURES[model_size], *bucket) for bucket in buckets},
    }
    path.write_text(json.dumps(found), encoding="utf-8")


def write_figures(plan: Plan, folder: Path, path: Path) -> None:
    """Run in `folder` and write the figures to `path`, or a "note" that says why there are none."""
    os.environ["ACCELERATE_USE_CPU"] = str(plan.device == "cpu").lower()
    clock = StepClock(torch.device(plan.device), num_warm_up=plan.num_warm_up, num_measured=plan.num_measured)
    with (
        (folder / "log.txt").open("w", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        figures = _figures(plan, folder, clock)
    path.write_text(json.dumps(figures), encoding="utf-8")


def _figures(plan: Plan, folder: Path, clock: StepClock) -> dict[str, Any]:
    try:
        _train(plan, SyntheticSet(folder, plan.buckets), clock)
    except UserError as error:
        if not isinstance(error.__cause__, torch.OutOfMemoryError):
            return {"note": str(error)}
        return {"note": "out of memory"}
    except torch.OutOfMemoryError:
        return {"note": "out of memory"}
    return clock.figures()


def _train(plan: Plan, training_set: SyntheticSet, clock: StepClock) -> None:
    training_set.write()
    device = torch.device(plan.device)

    def make_model(dtypes: ModelDtypes) -> SdxlModel:
        model = random_model(ARCHITECTURES[plan.model_size], dtypes, device)
        if plan.channels_last:
            nn.Module.to(model.unet, memory_format=torch.channels_last)
        _watch_networks(model, clock, plan)
        return model

    if plan.flags is None:
        model = make_model(ModelDtypes())
        train_plainly(model, training_set.batches(plan.batch_size), device, clock)
        return
    setup.check_prediction = lambda options: None  # there is no file
    setup.architecture_of = lambda options: ARCHITECTURES[plan.model_size]
    setup.load_model = lambda options, dtypes, *_, **__: make_model(dtypes)
    setup.load_unet = lambda *_: None
    _watch_loop(clock, plan)
    # Without the wrapper that turns a UserError into an exit status.
    sdxl_train.main.__wrapped__(  # type: ignore[attr-defined]
        [
            *("--pretrained_model_name_or_path=random/sdxl", f"--in_json={training_set.metadata}"),
            *(f"--train_data_dir={training_set.images}", f"--output_dir={training_set.folder / 'output'}"),
            *(f"--train_batch_size={plan.batch_size}", f"--max_train_steps={clock.num_steps}"),
            *(f"--dataset_repeats={MANY_REPEATS}", *RECIPE, *plan.flags),
        ]
    )


# -- the hooks -------------------------------------------------------------------------------------------------------


def _watch_networks(model: SdxlModel, clock: StepClock, plan: Plan) -> None:
    """Time the forward passes; text encoded before the first step belongs to no step."""
    flops = _flops_by_shape(plan)

    def begin_forward(unet: nn.Module, arguments: tuple[Any, ...]) -> None:
        clock.begin("forward")
        _count(clock, flops, arguments[0])

    if plan.flags is None:
        model.unet.register_forward_pre_hook(begin_forward)
        model.unet.register_forward_hook(lambda *_: clock.end("forward"))
    for text_encoder in (model.text_encoder_l, model.text_encoder_g):
        text_encoder.register_forward_pre_hook(lambda *_: clock.begin("text") if clock.is_running else None)
        text_encoder.register_forward_hook(lambda *_: clock.end("text") if clock.is_running else None)


def _flops_by_shape(plan: Plan) -> dict[tuple[int, int], int]:
    """Return the FLOP of a forward pass for one image, by height and width of its latents."""
    return {
        (bucket.height // PIXELS_PER_LATENT, bucket.width // PIXELS_PER_LATENT): count
        for bucket, count in zip(plan.buckets, plan.forward_flops, strict=True)
    }


def _count(clock: StepClock, flops: Mapping[tuple[int, int], int], latents: torch.Tensor) -> None:
    num_pictures, _, height, width = latents.shape
    clock.count(3 * flops[height, width] * num_pictures, num_pictures)  # the backward pass is twice the forward


def _watch_loop(clock: StepClock, plan: Plan) -> None:
    """Time the trainer's loop, and save nothing. (The network's hooks see nothing of a pass that a graph replays.)"""
    flops, predict = _flops_by_shape(plan), Learner.predict

    def timed_predict(self: Learner, noisy: NoisyLatents, *others: Any) -> torch.Tensor:
        with clock.stretch("forward"):
            _count(clock, flops, noisy.latents)
            return predict(self, noisy, *others)

    Learner.predict = timed_predict  # type: ignore[assignment, method-assign]
    Learner.backward = _timed(clock, Learner.backward, "backward")  # type: ignore[method-assign]
    Learner.step = _timed(clock, Learner.step, "optimizer")  # type: ignore[method-assign]
    log_step = Tracker.after_step

    def log_and_end_step(self: Tracker, occasion: Occasion, report: StepReport | None) -> None:
        log_step(self, occasion, report)
        if report is not None:
            clock.end_step()

    Tracker.after_step = log_and_end_step  # type: ignore[method-assign]
    Checkpoints.after_step = lambda *arguments: None  # type: ignore[method-assign]
    setup.check_disk = lambda *arguments: None


def _timed(clock: StepClock, function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def counted(*arguments: Any, **named: Any) -> Any:
        with clock.stretch(name):
            return function(*arguments, **named)

    return counted
