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
from library.sdxl.prediction import SDXL_PREDICTION, Prediction, find_prediction, require_noise_prediction

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
    assert found.kind == kind
    if kind == "epsilon":
        assert found == SDXL_PREDICTION
        require_noise_prediction("a model", found)
    else:
        with pytest.raises(UserError, match=rf"'a model' does not predict noise \(epsilon\): it says '{kind}'"):
            require_noise_prediction("a model", found)


@pytest.mark.parametrize(
    ("markers", "config"), [(("ztsnr",), {}), ((), scheduler(**USUAL, rescale_betas_zero_snr=True))]
)
def test_zero_terminal_snr_is_found(markers, config):
    found = find_prediction("a model", markers, {}, config)
    assert found == Prediction(has_zero_terminal_snr=True)
    with pytest.raises(UserError, match="another noise schedule than SDXL: has_zero_terminal_snr is True"):
        require_noise_prediction("a model", found)


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
        require_noise_prediction("a model", found)
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
    [({"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, {}), ({"a": torch.ones(1)}, {TYPE: "v"})],
)
def test_a_file_is_refused_by_its_header_alone(tensors, header, tmp_path: Path):
    save_file(tensors, tmp_path / "model.safetensors", header)
    with pytest.raises(UserError, match="does not predict noise"):
        read_single_file(tmp_path / "model.safetensors", ModelDtypes())


def test_a_pickle_with_markers_is_refused(tmp_path: Path):
    torch.save({"state_dict": {"v_pred": torch.tensor([])}}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="does not predict noise"):
        read_single_file(tmp_path / "model.ckpt", ModelDtypes())


def test_a_folder_is_refused_by_its_scheduler_alone(tmp_path: Path, sdxl_folder: Path):
    shutil.copytree(sdxl_folder, tmp_path / "folder", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.dumps(scheduler(**{**USUAL, "prediction_type": "v_prediction"}))
    (tmp_path / "folder" / "scheduler" / "scheduler_config.json").write_text(config, encoding="utf-8")
    with pytest.raises(UserError, match="folder' does not predict noise"):
        read_diffusers_folder(str(tmp_path / "folder"), ModelDtypes())
