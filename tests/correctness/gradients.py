"""Runs of sdxl_train.py, and the gradient of their one step.

    python -m tests.correctness.gradients OUTPUT [FLAGS [FLAGS ...]]

is one process of several. The main one writes the gradients: `OUTPUT/0.safetensors` of the first run, and so on. The
flags of a run are one argument, as JSON.
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator, PartialState
from safetensors.torch import save_file

import sdxl_train
from library.training.learner import Learner, StepReport
from tests.conftest import forget_accelerator


def gradient_of_one_step(argv: list[str]) -> dict[str, torch.Tensor]:
    """The gradient that the optimizer gets in a run of one step."""
    steps: list[dict[str, torch.Tensor]] = []

    step = Learner.step

    def recording(self: Learner, number: int) -> StepReport:
        unet = self.accelerator.unwrap_model(self.unet)
        steps.append({name: parameter.grad.clone() for name, parameter in unet.named_parameters()})
        return step(self, number)

    forget_accelerator()
    with patch.object(Learner, "step", recording):
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
