"""Runs of sdxl_train.py in which each picture's noise depends on the picture alone, and the gradient of the one step.

The trainer draws noise batch by batch and process by process, so that the same four pictures get other noise when they
are split in another way. That is as it should be, and would hide whether the split itself changes anything.

    python -m tests.correctness.keyed_noise OUTPUT [FLAGS [FLAGS ...]]

is one process of several. The main one writes the gradients: `OUTPUT/0.safetensors` of the first run, and so on. The
flags of a run are one argument, as JSON.
"""

import hashlib
import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator, PartialState
from safetensors.torch import save_file

import sdxl_train
from library.diffusion.noise import NoisyLatents
from library.diffusion.objective import Objective
from library.training.learner import Learner, StepReport

draw = Objective.draw


def noise_of_each_image(
    self: Objective, latents: torch.Tensor, generator: torch.Generator, strata: tuple[int, int, int] | None = None
) -> NoisyLatents:
    """As `Objective.draw`, but from a generator that each image's latents seed."""
    drawn = []
    for picture in latents.unbind():
        digest = hashlib.blake2b(picture.numpy().tobytes(), digest_size=8).digest()
        own = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        drawn.append(draw(self, picture[None], own))
    return NoisyLatents(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))


def gradient_of_one_step(argv: list[str]) -> dict[str, torch.Tensor]:
    """The gradient that the optimizer gets in a run of one step."""
    steps: list[dict[str, torch.Tensor]] = []

    step = Learner.step

    def recording(self: Learner, number: int) -> StepReport:
        unet = self.accelerator.unwrap_model(self.unet)
        steps.append({name: parameter.grad.clone() for name, parameter in unet.named_parameters()})
        return step(self, number)

    with patch.object(Learner, "step", recording), patch.object(Objective, "draw", noise_of_each_image):
        assert sdxl_train.main(argv) == 0
    [gradient] = steps
    return gradient


def main() -> None:
    """Make the runs that the command line asks for."""
    output, *runs = sys.argv[1:]
    with patch.object(Accelerator, "end_training"):  # which would end the group of processes with the first run
        gradients = [gradient_of_one_step(json.loads(flags)) for flags in runs]
    if PartialState().is_main_process:
        for index, gradient in enumerate(gradients):
            save_file(gradient, Path(output) / f"{index}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
