"""The six sizes: their order against diffusers, their embedding against the recorded reference."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from library.sdxl.size_conditioning import size_conditioning

GOLDEN = Path(__file__).parents[1] / "golden"
ROWS = json.loads((GOLDEN / "size_embeddings_index.json").read_text(encoding="utf-8"))["rows"]


def recorded_sizes(key):
    """[B, 2] of the reference's rows, height or top first."""
    return torch.tensor([row[key] for row in ROWS])


@pytest.fixture
def time_ids():
    return size_conditioning(*(recorded_sizes(key) for key in ("original_size_hw", "crop_top_left", "target_size_hw")))


@pytest.mark.parametrize("index", range(len(ROWS)))
def test_the_sizes_stand_in_diffusers_order(diffusers_pipeline, time_ids, index):
    row = ROWS[index]
    expected = diffusers_pipeline._get_add_time_ids(
        tuple(row["original_size_hw"]),
        tuple(row["crop_top_left"]),
        tuple(row["target_size_hw"]),
        dtype=torch.float32,
        text_encoder_projection_dim=diffusers_pipeline.text_encoder_2.config.projection_dim,
    )
    assert torch.equal(time_ids[index], expected[0])


def test_the_u_net_makes_the_recorded_embeddings_of_them(sdxl_model, time_ids):
    embedding = sdxl_model.unet.add_time_proj(time_ids.flatten()).reshape(len(ROWS), 6 * 256)
    recorded = torch.from_numpy(np.load(GOLDEN / "size_embeddings.npz")["emb"])
    # The angles reach 1600 radians, where neighbouring float32 numbers are 1.2e-4 apart.
    torch.testing.assert_close(embedding, recorded, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_every_size_keeps_its_last_digit(dtype):
    heights_1001 = torch.tensor([[1001, 2047]], dtype=dtype)
    time_ids = size_conditioning(heights_1001, torch.tensor([[0, 13]], dtype=dtype), heights_1001)
    assert time_ids.dtype == torch.float32
    assert time_ids.tolist() == [[1001, 2047, 0, 13, 1001, 2047]]
