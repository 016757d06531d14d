"""bitsandbytes' optimizers step without their wait for the GPU after each weight."""

import pytest
import torch
from torch.nn import Parameter

from library.optim.unwaiting import without_waits

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize(("is_paged", "num_waits"), [(False, 0), (True, 3)])
def test_only_paged_state_is_waited_for(monkeypatch: pytest.MonkeyPatch, is_paged: bool, num_waits: int):
    waits: list[object] = []
    monkeypatch.setattr(bitsandbytes.optim.optimizer, "sync_gpu", waits.append)
    weights = [Parameter(torch.ones(4)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = bitsandbytes.optim.AdamW8bit(weights)
    optimizer.is_paged = is_paged
    with without_waits(optimizer):
        optimizer.step()
    assert len(waits) == num_waits
    assert all((weight < 1).all() for weight in weights)
