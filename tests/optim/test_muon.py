"""Muon with AdamW: each weight is stepped by the one that is made for it, as torch's classes do."""

import torch
from torch.nn import Parameter

from library.optim.muon import EMBEDDING, Muon

SHAPES = {"matrix": (12, 6), "vector": (5,), "convolution": (4, 3, 3, 3), "embedding": (20, 6)}


def weights() -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = {name: Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    setattr(made["embedding"], EMBEDDING, True)
    return made


def test_matrices_are_stepped_by_muon_and_all_else_by_adamw_at_one_rate():
    ours, theirs = weights(), weights()
    optimizer = Muon(ours.values(), lr=1e-2, weight_decay=0.1, momentum=0.9, betas=(0.8, 0.95))
    muon = torch.optim.Muon(
        [theirs.pop("matrix")], lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95))
    [matrix] = muon.param_groups[0]["params"]
    theirs["matrix"] = matrix
    for step in range(1, 4):
        for name, parameter in ours.items():
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            parameter.grad, theirs[name].grad = gradient, gradient.clone()
        for each in (optimizer, muon, adamw):
            each.step()
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.items())
    assert optimizer.state[ours["matrix"]].keys() == {"momentum_buffer"}
    assert optimizer.state[ours["embedding"]].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_an_update_of_a_matrix_is_as_large_as_one_by_adamw():
    made = {shape: Parameter(torch.zeros(shape)) for shape in ((64, 64), (16, 256), (4096,))}
    optimizer = Muon(made.values(), lr=1e-3, weight_decay=0)
    for parameter in made.values():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    sizes = {shape: float(parameter.detach().square().mean().sqrt()) for shape, parameter in made.items()}
    # 0.2 of the rate is AdamW's usual size later in a run (Liu et al. 2025); its first step is one whole rate.
    assert all(0.1e-3 < size < 0.3e-3 for shape, size in sizes.items() if len(shape) == 2)
