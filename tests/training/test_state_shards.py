"""Parts of a state: what is written of them without other processes, and what is not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from library.training import state_shards
from library.training.state_shards import save_shards, split_off


def test_what_is_not_kept_in_parts_stays_as_it_is():
    content = {"betas": (0.9, 0.999), "names": ["unet", "l"], "step": torch.tensor(3.0), "none": None}
    found: dict[str, Any] = {}
    assert split_off(content, "optimizer.pt", found) == content
    assert found == {}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_error_of_writing_that_nobody_foresaw_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise MemoryError("no room for a tensor")

    monkeypatch.setattr(state_shards, "write_safetensors", fail)
    shards: Any = SimpleNamespace(accelerator=Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs()]))
    with pytest.raises(RuntimeError, match="no room for a tensor"):
        save_shards(tmp_path, {"weight": torch.zeros(3)}, shards)
