"""Comparison 4: steps of sdxl_train.py against steps written out plainly: same loss, gradients and weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from transformers.optimization import Adafactor

from library.data.epoch_order import BatchShape, EpochOrder
from library.training.accelerator import step_seed
from library.training.learner import Learner
from tests.conftest import PreparedSet
from tests.correctness.conftest import CAPTIONS, SHAPES
from tests.correctness.plain_training import PlainNoise, PlainTraining

Tensors = dict[str, torch.Tensor]
SEED = 7
ADAFACTOR = {"scale_parameter": False, "relative_step": False, "warmup_init": False, "weight_decay": 0.01}


@dataclass(frozen=True)
class Case:
    """Flags of a run, and what they mean in plain words."""

    flags: tuple[str, ...]
    num_steps: int = 1
    batch_size: int = 1
    accumulation_steps: int = 1
    noise: PlainNoise = PlainNoise()
    optimizer: Callable[..., torch.optim.Optimizer] = AdamW
    arguments: tuple[tuple[str, Any], ...] = ()
    max_grad_norm: float = 0.0
    weights: torch.dtype = torch.float32
    computation: torch.dtype = torch.float32

    def argv(self) -> Iterator[str]:
        """The flags of the run."""
        yield from self.flags
        yield f"--max_train_steps={self.num_steps}"
        yield f"--train_batch_size={self.batch_size}"
        yield f"--gradient_accumulation_steps={self.accumulation_steps}"
        yield f"--max_grad_norm={self.max_grad_norm}"

CASES = {
"adamw": Case(("--optimizer_type=AdamW", "--learning_rate=1e-3"), num_steps=2, arguments=(("lr", 1e-3),)),
}

@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[Tensors]:
    """The U-Net's gradients of each step of a run, as the optimizer finds them before they are clipped."""
    recorded: list[Tensors] = []
    step = Learner.step

    def recording(self: Learner, accelerator, max_grad_norm):
        recorded.append({name: parameter.grad.clone() for name, parameter in self.unet.named_parameters()})
        return step(self, accelerator, max_grad_norm)

    monkeypatch.setattr(Learner, "step", recording)
    return recorded


def steps_of(prepared: PreparedSet, case: Case) -> list[list[list[str]]]:
    keys = [f"{p} {s}" for p in CAPTIONS for s in SHAPES]
    import json
    entries = json.loads(prepared.latents_json.read_text())
    keys = list(entries)
    order = EpochOrder([tuple(entries[k]["train_resolution"]) for k in keys], BatchShape(case.batch_size, case.accumulation_steps), seed=SEED)
    steps=[[]]
    for mb in order:
        steps[-1].append([keys[i] for i in mb.indices])
        if mb.completes_step: steps.append([])
    return steps[:case.num_steps]


def test_it(train, gradients, two_buckets, tiny_sdxl, tiny_folder):
    import time
    for case in [
        CASES["adamw"],
        Case(("--optimizer_type=Adafactor", "--optimizer_args", *(f"{k}={v}" for k,v in ADAFACTOR.items()), "--learning_rate=1e-3", "--gradient_checkpointing","--noise_offset=0.0357","--adaptive_noise_scale=0.00357","--min_timestep=200","--max_timestep=700"), batch_size=3, accumulation_steps=4, optimizer=Adafactor, arguments=tuple({"lr":1e-3,**ADAFACTOR}.items()), noise=PlainNoise(0.0357,0.00357,200,700), max_grad_norm=0.5),
        Case(("--optimizer_type=Adafactor", "--optimizer_args", *(f"{k}={v}" for k,v in ADAFACTOR.items()), "--learning_rate=1e-3", "--gradient_checkpointing","--full_bf16","--mixed_precision=bf16"), batch_size=3, accumulation_steps=4, optimizer=Adafactor, arguments=tuple({"lr":1e-3,**ADAFACTOR}.items()), weights=torch.bfloat16, computation=torch.bfloat16),
        Case(("--learning_rate=1e-3", "--gradient_checkpointing","--mixed_precision=bf16","--optimizer_type=AdamW"), batch_size=3, accumulation_steps=4, arguments=(("lr",1e-3),), computation=torch.bfloat16),
    ]:
        gradients.clear()
        t=time.time()
        run = train(f"--in_json={two_buckets.latents_json}", f"--train_data_dir={two_buckets.images}", *case.argv())
        t1=time.time()
        pipeline = StableDiffusionXLPipeline.from_single_file(str(tiny_sdxl), config=str(tiny_folder), torch_dtype=case.computation)
        if case.weights != case.computation:
            pipeline.unet = UNet2DConditionModel.from_single_file(str(tiny_sdxl), config=str(tiny_folder), subfolder="unet", torch_dtype=case.weights)
        plain = PlainTraining(pipeline, two_buckets, case.noise)
        opt = case.optimizer(plain.unet.parameters(), **dict(case.arguments))
        losses=[]
        for i,batches in enumerate(steps_of(two_buckets, case), 1):
            print([len(b) for b in batches])
            losses.append(plain.backward(batches, torch.Generator().manual_seed(step_seed(SEED, i, 0))))
            for n,p in plain.unet.named_parameters():
                if not torch.equal(p.grad, gradients[i-1][n]):
                    print("grad", i, n, p.dtype, (p.grad-gradients[i-1][n]).norm()/p.grad.norm()); break
            else: print("grad equal", len(gradients[i-1]))
            if case.max_grad_norm: print(clip_grad_norm_(plain.unet.parameters(), case.max_grad_norm))
            opt.step(); opt.zero_grad()
        print(losses, run.logged("loss/current"))
        new = UNet2DConditionModel.from_single_file(str(run.output/"m.safetensors"), config=str(tiny_folder), subfolder="unet", torch_dtype=case.weights)
        bad=0
        for n,p in new.state_dict().items():
            q=plain.unet.state_dict()[n]
            if not torch.equal(p,q): bad+=1; w=((p-q).abs().max(), n)
        print("weights unequal", bad, w if bad else None, t1-t, time.time()-t1)
