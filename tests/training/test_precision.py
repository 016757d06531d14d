"""In which precision each part is held, for every combination of flags."""

import pytest
import torch

from library.sdxl.checkpoint_file import ModelDtypes
from library.training.precision import PrecisionOptions

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("mixed", "full", "trains_l", "trains_g", "float32_vae", "unet", "vae", "text_l", "text_g"),
    [
        # mixed precision: masters of what is trained stay in float32, what is frozen is held as it is computed
        ("no", False, False, False, False, F32, F32, F32, F32),
        ("bf16", False, False, False, False, F32, BF16, BF16, BF16),
        ("bf16", False, True, False, False, F32, BF16, F32, BF16),
        ("bf16", False, False, True, True, F32, F32, BF16, F32),
        ("fp16", False, False, False, False, F32, F16, F16, F16),
        ("fp16", False, False, False, True, F32, F32, F16, F16),
        ("fp16", False, True, True, False, F32, F16, F32, F32),
        # full bfloat16: what is trained too
        ("bf16", True, False, False, True, BF16, F32, BF16, BF16),
        ("bf16", True, True, True, False, BF16, BF16, BF16, BF16),
    ],
)
def test_each_part_is_held_as_the_flags_say(mixed, full, trains_l, trains_g, float32_vae, unet, vae, text_l, text_g):
    options = PrecisionOptions(mixed_precision=mixed, full_bf16=full)
    dtypes = options.model_dtypes(trains_l=trains_l, trains_g=trains_g, float32_vae=float32_vae)
    assert dtypes == ModelDtypes(unet=unet, vae=vae, text_encoder_l=text_l, text_encoder_g=text_g)


@pytest.mark.parametrize(("given", "dtype"), [(None, None), ("float", F32), ("fp16", F16), ("bf16", BF16)])
def test_saved_weights_have_the_precision_asked_for_or_else_their_own(given, dtype):
    assert PrecisionOptions(save_precision=given).save_dtype is dtype


@pytest.mark.parametrize("mixed", ["no", "fp16"])
def test_full_bf16_without_mixed_bf16_is_a_problem(mixed: str):
    problems = list(PrecisionOptions(mixed_precision=mixed, full_bf16=True).problems())
    assert problems[0] == f"--full_bf16 needs --mixed_precision=bf16, not {mixed}."


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp16_without_a_gpu_is_a_problem():
    [problem] = PrecisionOptions(mixed_precision="fp16").heavy_problems()
    assert problem == "--mixed_precision=fp16 needs a GPU; use bf16 or no."


@pytest.mark.parametrize(("mixed", "full"), [("no", False), ("bf16", False), ("bf16", True)])
def test_what_works_on_every_machine_is_no_problem(mixed: str, full: bool):
    assert list(PrecisionOptions(mixed_precision=mixed, full_bf16=full).problems()) == []
