"""What a model says that it predicts: marker tensors, header and scheduler lead to one record."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file

from library.config.errors import UserError
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file
from library.sdxl.diffusers_folder import read_diffusers_folder
from library.sdxl.prediction import SDXL_PREDICTION, Prediction
from library.sdxl.prediction_claims import find_prediction
from library.sdxl.prediction_options import AS_THE_MODEL_SAYS, PredictionOptions

TYPE, KEY = "modelspec.prediction_type", "modelspec.predict_key"
USUAL = SDXL_PREDICTION.scheduler_settings()


def scheduler(scheduler_class=EulerDiscreteScheduler, **settings):
    """The configuration as diffusers writes it."""
    return json.loads(scheduler_class(**settings).to_json_string())


@pytest.mark.parametrize(
    ("markers", "header", "config", "kind"),
    [
        ((), {}, {}, "epsilon"),
        ((), {TYPE: "epsilon", KEY: "eps"}, {}, "epsilon"),
        ((), {TYPE: "", KEY: " "}, {"prediction_type": None}, "epsilon"),
        ((), {}, scheduler(**USUAL), "epsilon"),
        (("v_pred",), {}, {}, "v_prediction"),
        (("edm_vpred.sigma_max", "edm_vpred.sigma_min"), {}, {}, "edm"),
        (("edm_mean", "edm_std"), {}, {}, "edm"),
        ((), {TYPE: "v"}, {}, "v_prediction"),
        ((), {TYPE: "V-Prediction"}, {}, "v_prediction"),
        ((), {KEY: "v"}, {}, "v_prediction"),
        ((), {TYPE: "rectified flow"}, {}, "flow_prediction"),
        ((), {TYPE: "next token"}, {}, "next_token"),
        ((), {}, scheduler(**{**USUAL, "prediction_type": "v_prediction"}), "v_prediction"),
        ((), {}, scheduler(DDPMScheduler, **{**USUAL, "prediction_type": "sample"}), "sample"),
        ((), {}, scheduler(EDMEulerScheduler), "edm"),
        ((), {}, scheduler(FlowMatchEulerDiscreteScheduler), "flow_prediction"),
        ((), {}, {**scheduler(**USUAL), "prediction_type": None, "use_flow_sigmas": True}, "flow_prediction"),
        (("v_pred",), {TYPE: "v", KEY: "v_prediction"}, {}, "v_prediction"),
    ],
)
def test_each_place_is_read(markers, header, config, kind):
    found = find_prediction("a model", {"a", *markers}, header, config)
    assert found.prediction.kind == kind
    if kind in ("epsilon", "v_prediction", "flow_prediction"):
        assert AS_THE_MODEL_SAYS.settled("a model", found) == Prediction(kind)
    else:
        with pytest.raises(UserError, match=rf"'a model' says that it predicts '{kind}', which is not known here"):
            AS_THE_MODEL_SAYS.settled("a model", found)


@pytest.mark.parametrize(
    ("markers", "config"), [(("ztsnr",), {}), ((), scheduler(**USUAL, rescale_betas_zero_snr=True))]
)
def test_zero_terminal_snr_is_found(markers, config):
    found = find_prediction("a model", markers, {}, config)
    assert AS_THE_MODEL_SAYS.settled("a model", found) == Prediction(has_zero_terminal_snr=True)


@pytest.mark.parametrize(
    ("header", "config"),
    [
        ({TYPE: "flow", "flow_shift": "2.5"}, {}),
        ({}, scheduler(FlowMatchEulerDiscreteScheduler, shift=2.5)),
        ({}, {"use_flow_sigmas": True, "flow_shift": 2.5}),
    ],
)
def test_the_shift_of_a_flow_is_found(header, config):
    assert find_prediction("a model", (), header, config).prediction == Prediction("flow_prediction", flow_shift=2.5)


@pytest.mark.parametrize("shift", ["0", "-1", "nan", "inf", "much"])
def test_a_flow_shift_that_no_flow_has_is_refused(shift):
    with pytest.raises(UserError, match="'a model' is drawn with a flow shift of"):
        find_prediction("a model", (), {TYPE: "flow", "flow_shift": shift}, {})


# -- flags and the file -----------------------------------------------------------------------------------------------

V, FLOW, NOISE = ({flag: True} for flag in ("v_parameterization", "flow_matching", "noise_prediction"))
CONVERT, RESCALED, SHIFT = {"convert_prediction": True}, {"zero_terminal_snr": True}, {"flow_shift": 3.0}


@pytest.mark.parametrize(
    ("flags", "header", "markers", "expected"),
    [
        (V, {}, (), Prediction("v_prediction")),  # the file says nothing
        (V, {}, ("ztsnr",), Prediction("v_prediction", has_zero_terminal_snr=True)),
        (V | RESCALED, {TYPE: "v"}, (), Prediction("v_prediction", has_zero_terminal_snr=True)),
        (RESCALED, {}, ("v_pred",), Prediction("v_prediction", has_zero_terminal_snr=True)),
        (RESCALED, {TYPE: "epsilon"}, (), Prediction(has_zero_terminal_snr=True)),
        (V | CONVERT, {TYPE: "epsilon"}, (), Prediction("v_prediction")),
        (V | CONVERT | RESCALED, {TYPE: "epsilon"}, (), Prediction("v_prediction", has_zero_terminal_snr=True)),
        (V | CONVERT, {}, (), Prediction("v_prediction")),
        (FLOW | CONVERT, {}, ("v_pred", "ztsnr"), Prediction("flow_prediction")),
        (FLOW, {}, ("ztsnr",), Prediction("flow_prediction")),
        (NOISE | CONVERT, {}, ("v_pred", "ztsnr"), Prediction()),
        (NOISE, {TYPE: "epsilon"}, (), Prediction()),
        (SHIFT, {TYPE: "flow", "flow_shift": "2.5"}, (), Prediction("flow_prediction", flow_shift=3.0)),
        ({}, {TYPE: "flow", "flow_shift": "2.5"}, (), Prediction("flow_prediction", flow_shift=2.5)),
        (FLOW | CONVERT | SHIFT, {}, ("v_pred",), Prediction("flow_prediction", flow_shift=3.0)),
    ],
)
def test_flags_and_file_lead_to_what_is_trained(flags, header, markers, expected):
    found = find_prediction("a model", markers, header, {})
    assert PredictionOptions(**flags).settled("a model", found) == expected


@pytest.mark.parametrize(
    ("flags", "header", "markers", "problem", "remedy"),
    [
        (
            V,
            {TYPE: "epsilon"},
            (),
            f"--v_parameterization: 'a model' predicts noise (epsilon): {TYPE} in the header says so",
            "--convert_prediction moves it to velocity (v)",
        ),
        (FLOW, {}, ("v_pred",), "--flow_matching: 'a model' predicts velocity (v): the tensor 'v_pred' says", "Remove"),
        (NOISE, {TYPE: "v"}, (), "--noise_prediction: 'a model' predicts velocity (v)", "Remove --noise_prediction"),
        (V | CONVERT, {}, ("v_pred",), "'a model' predicts velocity (v) already", "Remove --convert_prediction"),
        (
            RESCALED,
            {TYPE: "flow"},
            (),
            "--zero_terminal_snr rescales betas, and 'a model' is a flow",
            "Remove the flag",
        ),
        (SHIFT, {TYPE: "v"}, (), "--flow_shift belongs to flows, and 'a model' is none", "Remove the flag"),
        ({}, {TYPE: "flow"}, ("ztsnr",), "contradicts itself: it is a flow, and has rescaled betas", "Find out"),
        (V | CONVERT, {TYPE: "sample"}, (), "says that it predicts 'sample', which is not known here", "Only models"),
    ],
)
def test_a_contradiction_between_flags_and_file_is_refused(flags, header, markers, problem, remedy):
    found = find_prediction("a model", markers, header, {})
    with pytest.raises(UserError) as error:
        PredictionOptions(**flags).settled("a model", found)
    assert problem in error.value.problem
    assert remedy in str(error.value)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (V | FLOW, "--v_parameterization and --flow_matching exclude each other"),
        (CONVERT, "--convert_prediction: nothing says to what"),
        (FLOW | RESCALED, "--zero_terminal_snr rescales betas, and a flow has none"),
    ],
)
def test_flags_that_contradict_each_other_are_named(flags, problem):
    [found] = PredictionOptions(**flags).problems()
    assert problem in found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta_start", 0.0001),
        ("beta_end", 10**9),
        ("beta_schedule", "linear"),
        ("num_train_timesteps", 10**12),
        ("beta_start", "a" * 10**6),
        ("beta_end", [[0.012]]),
    ],
)
def test_another_noise_schedule_is_refused(key, value):
    found = find_prediction("a model", (), {}, {**scheduler(**USUAL), key: value})
    with pytest.raises(UserError, match="another noise schedule than SDXL: ") as error:
        AS_THE_MODEL_SAYS.settled("a model", found)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("markers", "header", "config", "what"),
    [
        (
            ("v_pred",),
            {TYPE: "epsilon"},
            {},
            f"the tensor 'v_pred' says 'v_prediction', {TYPE} in the header says 'epsilon'",
        ),
        ((), {TYPE: "v", KEY: "epsilon"}, {}, f"{TYPE} in the header says 'v_prediction', {KEY} in the header says"),
        (("v_pred", "edm_mean"), {}, {}, "the tensor 'v_pred' says 'v_prediction', the tensor 'edm_mean' says 'edm'"),
        (
            (),
            {},
            {"use_flow_sigmas": True, "prediction_type": "epsilon"},
            "use_flow_sigmas of the scheduler says 'flow_prediction', prediction_type of the scheduler says 'epsilon'",
        ),
    ],
)
def test_a_contradiction_is_named_with_its_places(markers, header, config, what):
    with pytest.raises(UserError) as error:
        find_prediction("a model", markers, header, config)
    assert f"'a model' contradicts itself about what it predicts: {what}" in str(error.value)


# -- before weights are read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "header"),
    [({"edm_mean": torch.tensor([]), "ztsnr": torch.tensor([])}, {}), ({"a": torch.ones(1)}, {TYPE: "sample"})],
)
def test_a_file_is_refused_by_its_header_alone(tensors, header, tmp_path: Path):
    save_file(tensors, tmp_path / "model.safetensors", header)
    with pytest.raises(UserError, match="which is not known here"):
        read_single_file(tmp_path / "model.safetensors", ModelDtypes())


def test_a_pickle_with_markers_is_refused(tmp_path: Path):
    torch.save({"state_dict": {"edm_mean": torch.tensor([])}}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="which is not known here"):
        read_single_file(tmp_path / "model.ckpt", ModelDtypes())


def test_a_folder_is_refused_by_its_scheduler_alone(tmp_path: Path, sdxl_folder: Path):
    shutil.copytree(sdxl_folder, tmp_path / "folder", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.dumps(scheduler(DDPMScheduler, **{**USUAL, "prediction_type": "sample"}))
    (tmp_path / "folder" / "scheduler" / "scheduler_config.json").write_text(config, encoding="utf-8")
    with pytest.raises(UserError, match="folder' says that it predicts 'sample'"):
        read_diffusers_folder(str(tmp_path / "folder"), ModelDtypes())
