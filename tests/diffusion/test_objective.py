"""The loss of each sample."""

import torch

from library.diffusion.objective import per_sample_loss


def test_each_sample_has_its_own_mean_squared_error():
    predicted = torch.zeros(3, 4, 2, 2)
    noise = torch.tensor([0.0, 1.0, -3.0]).view(3, 1, 1, 1).expand(3, 4, 2, 2)
    assert per_sample_loss(predicted, noise).tolist() == [0, 1, 9]


def test_the_loss_of_a_bf16_prediction_is_computed_in_float32():
    predicted = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    loss = per_sample_loss(predicted, noise)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, per_sample_loss(predicted.float(), noise.float()))


def test_masked_cells_add_nothing_but_count_in_the_mean():
    noise = torch.ones(1, 4, 2, 2)
    mask = torch.tensor([[1.0, 0.5], [0.0, 0.0]]).view(1, 1, 2, 2)
    assert per_sample_loss(torch.zeros_like(noise), noise, mask).tolist() == [1.5 / 4]


def test_the_gradient_pulls_the_prediction_to_the_noise():
    predicted = torch.zeros(1, 4, 2, 2, requires_grad=True)
    per_sample_loss(predicted, torch.ones(1, 4, 2, 2)).mean().backward()
    # d/dp mean((p - 1)^2) = 2 (p - 1) / 16
    assert torch.equal(predicted.grad, torch.full_like(predicted, -2 / 16))
