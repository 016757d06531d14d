"""What each encoder is worth, from losses: means, standard errors, bands of noise, and the sentence."""

import math

import numpy as np
import pytest

from library.training.ablation import ABLATIONS, BOTH, Losses, band_of, estimate, sentences

TIMESTEPS = (50, 150, 250, 350, 450, 550, 650, 750, 850, 950)
HIGH = np.array([band_of(timestep) == "high" for timestep in TIMESTEPS])


def losses(num_images: int = 24, **added: float | np.ndarray) -> Losses:
    """A loss of 0.15 and a little that differs between images; by `added` more in a condition, where noise is high."""
    random = np.random.default_rng(0)
    both = 0.15 + 0.02 * random.random((num_images, len(TIMESTEPS)))
    of = {BOTH: both}
    for name in ABLATIONS:
        spread = 0.002 * random.standard_normal((num_images, 1))
        of[name] = both + (added.get(name, 0.0) + spread) * HIGH
    return Losses(TIMESTEPS, of)


def test_the_standard_error_is_over_images():
    each = np.array([1.0, 2.0, 4.0, math.nan])
    assert estimate(each).mean == pytest.approx(7 / 3)
    assert estimate(each).error == pytest.approx(np.std([1, 2, 4], ddof=1) / 3**0.5)
    assert math.isnan(estimate(np.array([1.0])).error)
    assert math.isnan(estimate(np.array([math.nan])).mean)


def test_differences_are_means_over_timesteps_and_bands():
    found = losses(without_l=0.01, without_g=0.04, without_both=0.06)
    worth = found.worth()
    assert worth["l"].mean == pytest.approx((found.of["without_l"] - found.of[BOTH]).mean())
    assert worth["l/high"].mean == pytest.approx(worth["l"].mean * 10 / 3)
    assert worth["l/low"] == (0, 0)
    interaction = found.of["without_both"] - found.of["without_l"] - found.of["without_g"] + found.of[BOTH]
    assert worth["interaction"].mean == pytest.approx(interaction.mean())
    assert worth["interaction"].mean == pytest.approx(0.003, abs=0.001)


def test_of_a_model_that_is_blind_to_l_everything_about_l_is_exactly_0():
    seen = losses(without_g=0.04, other_g=0.06).of
    blind = dict(seen, without_l=seen[BOTH], other_l=seen[BOTH], without_both=seen["without_g"])
    worth = Losses(TIMESTEPS, blind).worth()
    for name in ("l", "l/high", "own_l", "interaction", "interaction/middle"):
        assert worth[name] == (0.0, 0.0)


def test_bands_are_thirds_of_all_timesteps():
    assert [band_of(timestep) for timestep in (0, 333, 334, 666, 667, 999)] == ["low"] * 2 + ["middle"] * 2 + [
        "high"
    ] * 2
    assert "l/middle" not in Losses((50, 950), {name: each[:, [0, 9]] for name, each in losses().of.items()}).worth()


def test_the_sentence_tells_worth_error_share_and_where():
    [sentence] = sentences(losses(without_l=0.01, other_l=0.02, without_g=0.04, other_g=0.08, without_both=0.06))
    assert sentence == (
        "L is worth 0.0029 +- 0.0002 (1.8 %), mostly at high noise; G 0.0119 +- 0.0001 (7.4 %), mostly at high noise"
    )


def test_it_is_said_when_the_model_needs_an_l_but_not_this_l():
    worth, needs = sentences(losses(without_l=0.01, without_g=0.04, other_g=0.08))
    assert worth.startswith("L is worth 0.0029 +- 0.0002")
    assert needs.startswith("the model needs an L, not this L: the L caption of another image does as well (it costs ")
    # Neither where no L does as well, nor where another L is worse than none.
    assert len([*sentences(losses(without_g=0.04, other_g=0.08))]) == 1
    assert len([*sentences(losses(without_l=0.01, other_l=0.02, without_g=0.04, other_g=0.08))]) == 1


def test_what_chance_explains_is_not_taken_for_worth():
    [sentence] = sentences(losses(without_g=0.04, other_g=0.08))
    assert "no more than chance explains; G 0.0119" in sentence
    [alone] = sentences(losses(num_images=1, without_g=0.04))
    assert "(one image: no error is known)" in alone
    assert "too few images to tell" in alone


def test_captions_that_are_all_alike_leave_their_condition_out():
    of = {
        name: each for name, each in losses(without_l=0.01, without_g=0.04, other_g=0.1).of.items() if name != "other_l"
    }
    of["other_g"][:5] = math.nan
    found = Losses(TIMESTEPS, of)
    assert "own_l" not in found.worth()
    assert found.mean("other_g") == pytest.approx(np.nanmean(of["other_g"]))
    assert len([*sentences(found)]) == 1
