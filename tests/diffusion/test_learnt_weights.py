"""Weights that are learnt: what their gradient is, what counts in it, and that a state holds them exactly."""

import copy

import pytest
import torch
from torch.optim import Adam

from library.diffusion.learnt_weights import LearntWeights
from library.diffusion.loss_options import LossOptions
from library.diffusion.objective import Objective

CHANNELS, RATE = 16, 0.01
TIMESTEPS = torch.tensor([3, 400, 650, 999])
LOSSES = torch.tensor([0.9, 0.1, 0.02, 0.004])


def learnt() -> LearntWeights:
    return LearntWeights(CHANNELS, RATE)


def same(number: torch.Tensor) -> torch.Tensor:
    return number


def backward(weights: LearntWeights, places: slice, scale: float = 1.0, times: int = 1) -> torch.Tensor:
    """Weigh the losses of some samples, go backward, return the gradient at the losses."""
    losses = LOSSES[places].clone().requires_grad_()
    total = weights.weighed(losses, TIMESTEPS[places]).sum() * scale
    for _ in range(times):
        total.backward(retain_graph=True)
    assert losses.grad is not None
    return losses.grad


def numbers(weights: LearntWeights) -> torch.Tensor:
    return weights.log_variance(torch.arange(0, 1000, 50))


def after(*steps: tuple[slice, float, int]) -> torch.Tensor:
    weights = learnt()
    for step in steps:
        backward(weights, *step)
    weights.learn(same)
    return numbers(weights)


ALL = slice(None)
ONCE = after((ALL, 0.25, 1))


def test_a_step_is_that_of_adam_on_the_mean_of_the_weighted_loss():
    weights = learnt()
    network = copy.deepcopy(weights._network)
    optimizer = Adam(network.parameters(), lr=RATE, betas=(0.9, 0.99))
    for _ in range(3):
        u = network(TIMESTEPS)
        optimizer.zero_grad()
        (LOSSES * (-u).exp() + u).mean().backward()
        optimizer.step()
        assert torch.equal(backward(weights, ALL), (-weights.log_variance(TIMESTEPS)).exp())
        weights.learn(same)
    torch.testing.assert_close(numbers(weights), network(torch.arange(0, 1000, 50)).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "steps",
    [
        [(slice(0, 3), 0.25, 1), (slice(3, 4), 0.25, 1)],  # accumulated
        [(ALL, 0.25, 2)],  # once for the norm of the gradient, once for the fused step
        [(ALL, 0.25 * 65536, 1)],  # under fp16's scale
        [(ALL, 0.25, 1), (slice(0, 2), 0.0, 1)],  # a batch that only keeps processes together
    ],
)
def test_each_loss_counts_once_however_it_goes_backward(steps):
    torch.testing.assert_close(after(*steps), ONCE, rtol=1e-4, atol=1e-6)


def test_two_processes_learn_what_one_would():
    parts = [learnt(), learnt()]
    backward(parts[0], slice(0, 3), 0.5)
    backward(parts[1], slice(3, 4), 0.5)
    sent: list[torch.Tensor] = []
    for part in parts:  # what each would hand to the exchange
        copy.deepcopy(part).learn(lambda number: sent.append(number) or number)
    for part in parts:
        part.learn(lambda number: sent[0] + sent[1])
    assert torch.equal(numbers(parts[0]), numbers(parts[1]))
    torch.testing.assert_close(numbers(parts[0]), ONCE, rtol=1e-4, atol=1e-6)


def test_what_is_not_trained_on_teaches_nothing():
    weights = learnt()
    backward(weights, ALL)
    weights.forget()  # a skipped step
    assert not numbers(weights).any()
    with torch.no_grad():  # validation
        weights.weighed(LOSSES, TIMESTEPS)
    assert weights._seen == {}


def test_u_becomes_the_logarithm_of_the_loss():
    weights = LearntWeights(64, 0.05)
    generator = torch.Generator().manual_seed(0)
    expected = -6 * torch.arange(1000) / 1000
    for _ in range(400):
        timesteps = torch.randint(0, 1000, (16,), generator=generator)
        losses = expected[timesteps].exp().requires_grad_()
        weights.weighed(losses, timesteps).mean().backward()
        weights.learn(same)
    found = weights.log_variance(torch.arange(1000))
    assert (found - expected).abs().max() < 0.4


def test_a_state_continues_bit_for_bit():
    first = learnt()
    for _ in range(2):
        backward(first, ALL)
        first.learn(same)
    second = LearntWeights(CHANNELS, RATE)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for weights in (first, second):
        backward(weights, slice(1, 3))
        weights.learn(same)
    assert torch.equal(numbers(first), numbers(second))
    with pytest.raises(RuntimeError):
        LearntWeights(CHANNELS + 1, RATE).load_state_dict(first.state_dict())


def test_the_loss_is_weighted_in_the_objective_and_the_plain_one_is_not():
    weights = learnt()
    backward(weights, ALL)
    weights.learn(same)
    objective = Objective(loss=LossOptions(), learnt=weights)
    latents, noise = torch.zeros(4, 4, 8, 8), torch.ones(4, 4, 8, 8)
    noisy = objective.noised(latents, noise, TIMESTEPS)
    u = weights.log_variance(TIMESTEPS)
    assert objective.plain_losses(latents, latents, noisy).tolist() == [1] * 4
    torch.testing.assert_close(objective.losses(latents, latents, noisy), (-u).exp() + u)
