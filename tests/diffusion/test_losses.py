"""Losses and weights of each timestep, against recorded values and their formulas."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from library.config.options import problems_of
from library.diffusion import noise
from library.diffusion.forward_process import make_forward_process
from library.diffusion.loss_options import EDM2, LossOptions
from library.diffusion.loss_weights import make_loss_weights
from library.diffusion.noise import NoisyLatents
from library.diffusion.objective import Objective
from library.diffusion.options import NoiseOptions
from library.diffusion.pixel_losses import huber_thresholds, pseudo_huber
from library.sdxl.prediction import EPSILON, FLOW, VELOCITY, Prediction

GOLDEN = Path(__file__).parents[1] / "golden"
ARRAYS = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "objective.npz").items()}
INDEX = json.loads((GOLDEN / "objective_index.json").read_text(encoding="utf-8"))
OLD_WEIGHTS = json.loads((GOLDEN / "loss_weights.json").read_text(encoding="utf-8"))
LATENTS, NOISE, PREDICTED = (ARRAYS[name] for name in ("latents", "noise", "model_pred"))


def prediction(kind: str, schedule: str = "standard") -> Prediction:
    return Prediction(kind, has_zero_terminal_snr=schedule == "zero_terminal_snr")


def noisy_at(objective: Objective, timesteps: list[int]) -> NoisyLatents:
    return objective.noised(LATENTS, NOISE, torch.tensor(timesteps))


def assert_close(found: torch.Tensor, expected: list[float], rtol: float = 2e-5) -> None:
    np.testing.assert_allclose(found.tolist(), expected, rtol=rtol)


# -- errors of latent values ------------------------------------------------------------------------------------------


def test_each_loss_of_errors_is_the_recorded_one():
    for case in INDEX["pixel_loss"]:
        settings = {key: case[key] for key in ("huber_schedule", "huber_c", "huber_scale") if key in case}
        options = LossOptions(loss_type=case["loss_type"], **settings)
        kind = prediction({"noise": EPSILON, "v": VELOCITY}[case["target"]], case["schedule"])
        objective = Objective(prediction=kind, loss=options)
        noisy = noisy_at(objective, case["timesteps"])
        # The reference subtracts nearly equal numbers where errors are small, and loses digits.
        assert_close(objective.losses(PREDICTED, LATENTS, noisy), case["per_sample"], rtol=1e-4)
        if "threshold" in case:
            found = huber_thresholds(torch.tensor(case["timesteps"]), options, make_forward_process(kind))
            assert_close(found, case["threshold"])


def test_small_errors_lose_no_digits():
    errors = torch.tensor([1e-4, 1e-3, 30.0])
    exact = 2 * ((errors.double() ** 2 + 1).sqrt() - 1)
    torch.testing.assert_close(pseudo_huber(errors, torch.ones(3)).double(), exact, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("schedule", ["snr", "exponential", "constant"])
def test_the_thresholds_of_a_flow_fall_from_1_to_c(schedule: str):
    options = LossOptions(loss_type="huber", huber_schedule=schedule, huber_c=0.2)
    found = huber_thresholds(torch.tensor([0.0, 500.0, 1000.0]), options, make_forward_process(prediction(FLOW)))
    middle = {"snr": 0.8 / 4 + 0.2, "exponential": 0.2**0.5, "constant": 0.2}[schedule]
    assert_close(found, [0.2 if schedule == "constant" else 1.0, middle, 0.2])


# -- weights of timesteps ---------------------------------------------------------------------------------------------

OPTIONS_OF_ROW = {
    "min_snr": lambda row: LossOptions(min_snr_gamma=row["gamma"]),
    "debiased_estimation": lambda row: LossOptions(debiased_estimation_loss=True),
    "scale_v_pred_loss_like_noise_pred": lambda row: LossOptions(scale_v_pred_loss_like_noise_pred=True),
    "v_pred_like_loss": lambda row: LossOptions(v_pred_like_loss=row["value"]),
}
KINDS = {"eps": EPSILON, "v": VELOCITY}


@pytest.mark.parametrize("number", [0, 1])
def test_each_weight_is_the_recorded_one(number: int):
    case = INDEX["weights"][number]
    timesteps = torch.tensor(case["timesteps"])
    # Of the rescaled schedule the last value but one is what rounding leaves of 1e-7.
    rtol = 2e-5 if case["schedule"] == "standard" else 5e-3
    for row in case["rows"]:
        kind = KINDS.get(row.get("prediction"), VELOCITY if row["kind"].startswith("scale_v") else EPSILON)
        process = make_forward_process(prediction(kind, case["schedule"]))
        weights = make_loss_weights(OPTIONS_OF_ROW[row["kind"]](row), kind, process)
        assert_close(weights(timesteps), row["weight"], rtol)
        assert_close(process.snr(timesteps), case["snr"], rtol)


@pytest.mark.parametrize(
    ("column", "kind", "options"),
    [
        ("min_snr_gamma_5_eps", EPSILON, LossOptions(min_snr_gamma=5)),
        ("min_snr_gamma_5_v", VELOCITY, LossOptions(min_snr_gamma=5)),
        ("debiased_eps", EPSILON, LossOptions(debiased_estimation_loss=True)),
        ("debiased_v", VELOCITY, LossOptions(debiased_estimation_loss=True)),
        (
            "scale_v_pred_loss_like_noise_pred",
            VELOCITY,
            LossOptions(scale_v_pred_loss_like_noise_pred=True),
        ),
        ("v_pred_like_loss_0.1", EPSILON, LossOptions(v_pred_like_loss=0.1)),
    ],
)
def test_the_weights_of_the_usual_schedule_are_the_reference_s(column: str, kind: str, options: LossOptions):
    weights = make_loss_weights(options, kind, make_forward_process(prediction(kind)))
    assert_close(weights(torch.tensor(OLD_WEIGHTS["timesteps"])), OLD_WEIGHTS["standard"][column])


def test_the_losses_of_whole_steps_are_the_recorded_ones():
    for case in INDEX["step_loss"]:
        settings = dict(case["settings"])
        kind = VELOCITY if settings.pop("v_parameterization", False) else EPSILON
        objective = Objective(prediction=prediction(kind, case["schedule"]), loss=LossOptions(**settings))
        losses = objective.losses(PREDICTED, LATENTS, noisy_at(objective, case["timesteps"]))
        # At t = 990 of the rescaled schedule the SNR is 1.7e-5, and rounded.
        assert_close(losses, case["per_sample"], rtol=1e-3 if case["schedule"] != "standard" else 1e-4)


WEIGHTED = [
    (EPSILON, LossOptions(min_snr_gamma=5)),
    (VELOCITY, LossOptions(min_snr_gamma=5)),
    (EPSILON, LossOptions(debiased_estimation_loss=True)),
    (VELOCITY, LossOptions(debiased_estimation_loss=True)),
    (VELOCITY, LossOptions(scale_v_pred_loss_like_noise_pred=True)),
    (EPSILON, LossOptions(v_pred_like_loss=1.0)),
    (EPSILON, LossOptions(min_snr_gamma=1, debiased_estimation_loss=True, v_pred_like_loss=0.1, loss_type="huber")),
    (VELOCITY, LossOptions(loss_type="smooth_l1")),
    (FLOW, LossOptions(loss_type="huber")),
]


@pytest.mark.parametrize("rescaled", ["standard", "zero_terminal_snr"])
@pytest.mark.parametrize(("kind", "options"), WEIGHTED)
def test_no_weight_is_nan_or_infinite_at_either_end(kind: str, options: LossOptions, rescaled: str):
    if kind == FLOW:
        rescaled = "standard"
    objective = Objective(prediction=prediction(kind, rescaled), loss=options)
    noisy = noisy_at(objective, [0, 1000 if kind == FLOW else 999])
    predicted = PREDICTED.clone().requires_grad_()
    losses = objective.losses(predicted, LATENTS, noisy)
    losses.sum().backward()
    assert losses.isfinite().all() and predicted.grad.isfinite().all()
    still = objective.losses(objective.target(LATENTS, noisy), LATENTS, noisy)
    assert still.tolist() == [0, 0]


def test_where_nothing_is_left_of_the_image_an_infinite_weight_is_that_of_the_timestep_before():
    process = make_forward_process(prediction(EPSILON, "zero_terminal_snr"))
    weights = make_loss_weights(LossOptions(debiased_estimation_loss=True), EPSILON, process)
    before, last = weights(torch.tensor([998, 999])).tolist()
    assert last == before > 1000


# -- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", INDEX["with_draws"][:4], ids=lambda case: case["arrays"])
def test_noise_with_random_strength_and_perturbed_input_is_the_recorded_one(case, monkeypatch: pytest.MonkeyPatch):
    arrays = {name.removeprefix(case["arrays"]): ARRAYS[name] for name in ARRAYS if name.startswith(case["arrays"])}
    asked: list[str] = []

    def normal(shape, generator, device, dtype=torch.float32):
        name = next(each for each in case["order"] if each.endswith("noise") and each not in asked)
        asked.append(name)
        assert arrays[name].shape == torch.Size(shape)
        return arrays[name]

    def uniform(generator):
        name = next(each for each in case["order"] if each.endswith("draw") and each not in asked)
        asked.append(name)
        return case[name]

    def timesteps(*_: object, **__: object) -> torch.Tensor:
        asked.append("timesteps")
        return torch.tensor(case["timesteps"])

    monkeypatch.setattr(noise, "_normal", normal)
    monkeypatch.setattr(noise, "_uniform", uniform)
    monkeypatch.setattr("library.diffusion.objective.draw_timesteps", timesteps)
    objective = Objective(NoiseOptions(**case["settings"]), prediction(EPSILON, case["schedule"]))
    drawn = objective.draw(LATENTS, [torch.Generator()])
    assert asked == case["order"]
    torch.testing.assert_close(drawn.noise, arrays["result_noise"], rtol=0, atol=1e-6)
    torch.testing.assert_close(drawn.latents, arrays["result_noisy"], rtol=0, atol=4e-6)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (LossOptions(huber_c=0.2), "--huber_c has no effect on --loss_type l2"),
        (LossOptions(loss_type="l1", huber_schedule="constant"), "--huber_schedule has no effect on --loss_type l1"),
        (LossOptions(loss_type="huber", huber_scale=2.0), "--huber_scale has no effect on --huber_schedule snr"),
        (LossOptions(loss_type="huber", huber_c=0.0), "--huber_c is 0"),
        (LossOptions(min_snr_gamma=-1.0), "--min_snr_gamma is -1"),
        (LossOptions(v_pred_like_loss=-0.1), "--v_pred_like_loss is -0.1"),
        (LossOptions(edm2_channels=64), "--edm2_channels has no effect without --loss_weighting edm2"),
        (LossOptions(loss_weighting=EDM2, min_snr_gamma=5.0), "which undoes --min_snr_gamma; keep one of them"),
    ],
)
def test_values_that_cannot_work_are_named(options: LossOptions, expected: str):
    [problem] = problems_of(options)
    assert expected in problem


@pytest.mark.parametrize(
    ("options", "kind", "expected"),
    [
        (LossOptions(min_snr_gamma=5), FLOW, "--min_snr_gamma weighs by the signal-to-noise ratio"),
        (LossOptions(debiased_estimation_loss=True), FLOW, "--debiased_estimation_loss weighs"),
        (LossOptions(scale_v_pred_loss_like_noise_pred=True), EPSILON, "for models that predict velocity"),
        (LossOptions(v_pred_like_loss=0.1), VELOCITY, "for models that predict noise"),
    ],
)
def test_weights_for_another_target_are_named(options: LossOptions, kind: str, expected: str):
    assert problems_of(options) == []
    [problem] = options.misfits(kind)
    assert expected in problem


@pytest.mark.parametrize(("kind", "options"), WEIGHTED)
def test_weights_that_fit_have_no_problems(kind: str, options: LossOptions):
    assert problems_of(options) == list(options.misfits(kind)) == []
