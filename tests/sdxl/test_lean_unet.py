"""The U-Net with fewer launches computes what diffusers' does."""

import copy

import pytest
import torch

from library.sdxl.lean_unet import make_lean


def inputs(dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "sample": draw(2, 4, 16, 16),
        "timestep": torch.tensor([10, 700]),
        "encoder_hidden_states": draw(2, 77, WIDTH).to(dtype),
        "added_cond_kwargs": {
            "text_embeds": draw(2, POOLED).to(dtype),
            "time_ids": torch.tensor([[1001.0, 999, 0, 3, 1024, 1024]] * 2),
        },
    }


@pytest.fixture(scope="module")
def unet(sdxl_model):
    global WIDTH, POOLED
    config = sdxl_model.unet.config
    WIDTH, POOLED = config.cross_attention_dim, config.projection_class_embeddings_input_dim - 6 * 256
    return copy.deepcopy(sdxl_model.unet).float()


def learnt(unet, dtype=torch.float32, *, autocast: bool = False):
    """Prediction and gradients."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        predicted = unet(**inputs(dtype)).sample.float()
    predicted.square().mean().backward()
    gradients = {name: weight.grad.float() for name, weight in unet.named_parameters()}
    unet.zero_grad()
    return predicted.detach(), gradients


def distance(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_float32_it_predicts_and_learns_the_same(unet, checkpointing: bool):
    expected, expected_gradients = learnt(unet)
    lean = copy.deepcopy(unet).train()
    if checkpointing:
        lean.enable_gradient_checkpointing()
    make_lean(lean, without_autocast=False)
    assert list(lean.state_dict()) == list(unet.state_dict())
    ours, gradients = learnt(lean)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)  # order of sums in longer products
    total = torch.cat([gradient.flatten() for gradient in gradients.values()])
    assert distance(total, torch.cat([expected_gradients[name].flatten() for name in gradients])) < 1e-4


def test_in_bfloat16_without_autocast_it_is_as_far_from_float32_as_with_it(unet):
    exact, exact_gradients = learnt(unet)
    narrow = copy.deepcopy(unet).to(torch.bfloat16)
    usual, usual_gradients = learnt(narrow, torch.bfloat16, autocast=True)
    make_lean(narrow, without_autocast=True)
    ours, gradients = learnt(narrow, torch.bfloat16, autocast=True)
    assert distance(ours, exact) < 1.5 * distance(usual, exact)
    everything = [torch.cat([each[name].flatten() for name in gradients]) for each in (gradients, usual_gradients)]
    whole = torch.cat([exact_gradients[name].flatten() for name in gradients])
    assert distance(everything[0], whole) < 1.5 * distance(everything[1], whole)


def test_a_copy_computes_with_weights_of_its_own(unet):
    lean = copy.deepcopy(unet)
    make_lean(lean, without_autocast=True)
    other = copy.deepcopy(lean)
    with torch.no_grad():
        before = lean(**inputs()).sample
        for weight in other.parameters():
            weight.zero_()
        assert torch.equal(lean(**inputs()).sample, before)
        assert not other(**inputs()).sample.any()
