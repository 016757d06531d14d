"""Load the U-Net of a checkpoint to a GPU that is not there, and print how much host memory that takes.

    python benchmarks/rehearsal/loading.py sd_xl.safetensors

The file is read and its numbers are converted; what would be copied to the GPU is let go. Frozen networks stay in host
memory, as in training. Needs what the rehearsal needs, and Linux.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, find library/

import sdxl_train  # noqa: F401  # isort: skip  # before torch, since it says how torch is to take its memory
import torch

from benchmarks.phases import PhaseRecorder, anonymous_bytes
from benchmarks.rehearsal.stand_in import CUDA, stand_in_gpu, why_not
from library.sdxl.checkpoint_file import ModelDtypes
from library.sdxl.model_source import ModelOptions, load_model, load_unet

_GIB = 2**30


def main(argv: Sequence[str] | None = None) -> int:
    """Load, print and leave: the thread of a GPU that is not there cannot be joined."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint or a diffusers folder")
    options = ModelOptions(parser.parse_args(argv).model)
    reason = why_not()
    if reason is not None:
        print(f"no rehearsal: {reason}", file=sys.stderr)
        return 2
    narrow = torch.bfloat16
    with stand_in_gpu() as books:
        recorder = PhaseRecorder()
        print(f"before: {anonymous_bytes() / _GIB:.2f} GiB of host memory")
        with recorder.phase("L, G and VAE in host memory"):
            model = load_model(options, ModelDtypes(narrow, narrow, narrow, narrow), with_unet=False)
        print(_said(recorder))
        with recorder.phase("U-Net to the GPU"):
            load_unet(options, model.unet, narrow, CUDA)
        print(f"{_said(recorder)}; on the GPU {books.now / _GIB:.2f}", flush=True)
    os._exit(0)


def _said(recorder: PhaseRecorder) -> str:
    """Return the peak of host memory in the last phase, and what is held after it."""
    last = recorder.rows[-1]
    return f"{last['phase']}: peak {last['peak_gib']:.2f} GiB, then {anonymous_bytes() / _GIB:.2f}"


if __name__ == "__main__":
    sys.exit(main())
