"""The U-Net with fewer launches computes what diffusers' does."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from demo.random_sdxl import TINY
from library.diffusion.objective import Objective
from library.diffusion.options import NoiseOptions
from library.optim.adafactor import Adafactor
from library.optim.options import STOCHASTIC
from library.optim.rounding import Rounder
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


def test_weights_of_one_product_lie_side_by_side_and_learn_alone_where_they_do_not(unet):
    lean = copy.deepcopy(unet)
    make_lean(lean, without_autocast=True)
    attention = lean.mid_block.attentions[0].transformer_blocks[0].attn1
    layers = attention.to_q, attention.to_k, attention.to_v
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1
    apart = copy.deepcopy(lean)  # whose weights are copied one by one
    ours, gradients = learnt(lean)
    others, gradients_apart = learnt(apart)
    assert torch.equal(ours, others)
    assert all(torch.equal(gradients[name], gradients_apart[name]) for name in gradients)
    attention.to_k.weight.requires_grad_(False)
    _, gradients_but_one = learnt_if_any(lean)
    frozen = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"
    assert frozen not in gradients_but_one
    assert all(torch.equal(gradients[name], each) for name, each in gradients_but_one.items())
    lean.load_state_dict({name: torch.zeros_like(weight) for name, weight in apart.state_dict().items()})
    assert not lean(**inputs()).sample.any()


def learnt_if_any(unet):
    """Prediction, and gradients of the weights that learn."""
    predicted = unet(**inputs()).sample
    predicted.square().mean().backward()
    gradients = {name: weight.grad.clone() for name, weight in unet.named_parameters() if weight.requires_grad}
    unet.zero_grad()
    return predicted.detach(), gradients


def losses_of_50_steps(*, lean: bool, rounding_seed: int) -> torch.Tensor:
    """Losses of a small U-Net in bfloat16 that learns one batch with Adafactor, noise and timesteps always the same."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(TINY.unet | {"transformer_layers_per_block": [1, 1, 1]}).bfloat16()
    if lean:
        make_lean(unet, without_autocast=True)
    parameters = list(unet.parameters())
    optimizer = Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False)
    optimizer.rounder = Rounder(STOCHASTIC, parameters, rounding_seed)
    generator, objective = torch.Generator().manual_seed(0), Objective(NoiseOptions())
    latents = torch.randn(4, 4, 16, 16, generator=generator)
    losses = []
    for step in range(1, 51):
        optimizer.rounder.start(step)
        noisy = objective.draw(latents, [generator])
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(
                noisy.latents.bfloat16(),
                noisy.timesteps,
                encoder_hidden_states=torch.zeros(4, 1, unet.config.cross_attention_dim, dtype=torch.bfloat16),
                added_cond_kwargs={
                    "text_embeds": torch.zeros(4, TINY.text_encoder_g["projection_dim"], dtype=torch.bfloat16),
                    "time_ids": torch.zeros(4, 6),
                },
            ).sample.float()
        loss = objective.losses(predicted, latents, noisy).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.slow
def test_the_loss_over_50_steps_differs_by_no_more_than_rounding_at_random_does():
    usual, rounded_otherwise = (losses_of_50_steps(lean=False, rounding_seed=seed) for seed in (0, 1))
    ours = losses_of_50_steps(lean=True, rounding_seed=0)
    noise = (usual - rounded_otherwise).abs().mean()
    assert usual[-10:].mean() < 0.9 * usual[:10].mean(), "it learns"
    assert (ours - usual).abs().mean() < 1.5 * noise
    assert (ours[-10:].mean() - usual[-10:].mean()).abs() < 3 * noise
