"""Parameter groups, optimizers by name, and Adafactor against the reference's numbers."""

import importlib.util
import re
import site
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from library.config.errors import UserError
from library.config.options import problems_of
from library.optim.arguments import parse_arguments
from library.optim.known_optimizers import OPTIMIZERS, OptimizerKind
from library.optim.optimizers import make_optimizer, make_parameter_groups
from library.optim.options import ADAFACTOR_RECIPE, OptimizerOptions

GOLDEN = Path(__file__).parents[1] / "golden" / "adafactor.npz"
ADAFACTOR_ARGS = ADAFACTOR_RECIPE.split()[1:]
TENSORS = ("mat", "vec", "conv", "row", "big_grad_mat", "scalar")
NAMED_UNET = ("time_embed.0.weight", "input_blocks.1.0.in_layers.0.weight", "out.2.bias")  # blocks 0, 2, 22


def parameters(count: int = 1) -> list[Parameter]:
    return [Parameter(torch.zeros(2)) for _ in range(count)]


def unet() -> list[tuple[str, Parameter]]:
    return [(name, Parameter(torch.zeros(2))) for name in NAMED_UNET]


def one_group(learning_rate: float = 1e-3) -> list[dict]:
    return [{"name": "unet", "params": parameters(), "lr": learning_rate}]


# -- parameter groups -------------------------------------------------------------------------------------------------


def test_each_part_is_a_group_with_a_separate_rate():
    options = OptimizerOptions(learning_rate=1e-5, learning_rate_te1=3e-6)
    groups = make_parameter_groups(options, unet(), parameters(2), parameters(4))
    assert [(group["name"], len(group["params"]), group["lr"]) for group in groups] == [
        ("unet", 3, 1e-5),
        ("text_encoder_l", 2, 3e-6),
        ("text_encoder_g", 4, 1e-5),  # falls back on --learning_rate
    ]


def test_a_part_with_rate_0_is_frozen_and_has_no_group():
    frozen, trained = parameters(), parameters()
    for parameter in trained:
        parameter.requires_grad_(False)
    options = OptimizerOptions(learning_rate=0, learning_rate_te1=0, learning_rate_te2=1e-6)
    groups = make_parameter_groups(options, unet(), frozen, trained)
    assert [group["name"] for group in groups] == ["text_encoder_g"]
    assert [parameter.requires_grad for parameter in (*frozen, *trained)] == [False, True]


def test_block_rates_make_a_group_for_each_block_and_freeze_those_at_0():
    named = unet()
    rates = ["1e-5", "1e-5", "0", *["1e-5"] * 19, "2e-6"]
    groups = make_parameter_groups(OptimizerOptions(block_lr=",".join(rates)), named)
    assert [(group["name"], group["lr"]) for group in groups] == [("unet block 0", 1e-5), ("unet block 22", 2e-6)]
    assert [parameter.requires_grad for _, parameter in named] == [True, False, True]


def test_nothing_left_to_train_is_an_error():
    with pytest.raises(UserError, match="nothing to train"):
        make_parameter_groups(OptimizerOptions(learning_rate=0), unet())


def test_the_optimizer_steps_each_group_at_its_rate():
    options = OptimizerOptions(optimizer_type="torch.optim.SGD", learning_rate=0.5, learning_rate_te2=0.25)
    named, encoder_g = unet(), parameters()
    optimizer = make_optimizer(make_parameter_groups(options, named, (), encoder_g), options)
    for parameter in (named[0][1], encoder_g[0]):
        parameter.grad = torch.ones(2)
    optimizer.step()
    assert named[0][1].tolist() == [-0.5, -0.5]
    assert encoder_g[0].tolist() == [-0.25, -0.25]


# -- arguments --------------------------------------------------------------------------------------------------------


def test_optimizer_arguments_are_python_values():
    words = [
        "weight_decay=0.01",
        "betas=0.9,0.99",
        "relative_step=False",
        "beta1=None",
        "eps=(1e-30, 1e-3)",
        "mode='a'",
    ]
    assert parse_arguments("--optimizer_args", words) == {
        "weight_decay": 0.01,
        "betas": (0.9, 0.99),
        "relative_step": False,
        "beta1": None,
        "eps": (1e-30, 1e-3),
        "mode": "a",
    }


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["amsgrad=False,"], {"amsgrad": False}),
        (["amsgrad=True,"], {"amsgrad": True}),
        (["weight_decay=0.01;"], {"weight_decay": 0.01}),
        (["scale_parameter=False,", "relative_step=False"], {"scale_parameter": False, "relative_step": False}),
        (["safeguard_warmup=False,", "decouple=True,"], {"safeguard_warmup": False, "decouple": True}),
        (["scale_parameter=False,relative_step=False"], {"scale_parameter": False, "relative_step": False}),
        (["weight_decay=0.01 betas=0.9,0.99"], {"weight_decay": 0.01, "betas": (0.9, 0.99)}),
        (["betas=(0.9, 0.99),eps=1e-8"], {"betas": (0.9, 0.99), "eps": 1e-8}),
        ([","], {}),
        ([""], {}),
    ],
    ids=str,
)
def test_commas_and_spaces_between_arguments_are_no_part_of_them(words: list[str], arguments: dict):
    assert parse_arguments("--optimizer_args", words) == arguments


@pytest.mark.parametrize(
    ("optimizer_type", "reason"),
    [("torch.optim.Muon", "Muon only supports 2D parameters"), ("torch.optim.SparseAdam", "dense gradients")],
)
def test_an_optimizer_that_cannot_train_sdxl_is_named_as_such(optimizer_type: str, reason: str):
    [said] = OptimizerOptions(optimizer_type=optimizer_type).heavy_problems()
    assert f"--optimizer_type {optimizer_type} cannot train SDXL" in said
    assert reason in said
    assert "--optimizer_args" not in said
    assert ("--optimizer_type=Muon can." in said) == (optimizer_type == "torch.optim.Muon")


def test_what_an_optimizer_prints_does_not_reach_the_console(capsys):
    options = OptimizerOptions(optimizer_type="Prodigy", optimizer_args=["decouple=True"], learning_rate=1.0)
    assert list(options.heavy_problems()) == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "word",
    [
        "weight_decay",
        "weight_decay=",
        "relative_step=false",
        "=3",
        "a b=3",
        "eps=__import__('os')",
        "eps=1e400",
        "betas=0.9,-1e400",
    ],
)
def test_an_argument_that_is_not_understood_is_named(word: str):
    with pytest.raises(UserError) as caught:
        parse_arguments("--optimizer_args", ["eps2=1", word])
    assert f"'{word}'" in str(caught.value)


def test_an_argument_set_twice_is_an_error():
    with pytest.raises(UserError, match="'eps' is set twice"):
        parse_arguments("--optimizer_args", ["eps=1", "eps=2"])


# -- strangers' classes -----------------------------------------------------------------------------------------------

CLASS = """
from torch.optim import SGD
class Own(SGD):
    def __init__(self, params, lr, how="right"):
        super().__init__(params, lr)
        self.how = how
        if how == "construct":
            {}["missing"]
    def step(self, closure=None):
        if self.how == "step":
            1 / 0
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch) -> Callable[[str, str], None]:
    """`installed("name", "source")` installs a package of one module into a folder of packages."""
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)

    return install


def test_a_file_of_the_current_folder_is_never_run(tmp_path: Path, monkeypatch):
    (tmp_path / "own_file.py").write_text(f"open(r'{tmp_path / 'ran'}', 'w').close()", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for optimizer_type in ("own_file.Own", "setup.Own", "sdxl_train.Own", "json.Own"):
        [said] = OptimizerOptions(optimizer_type=optimizer_type).heavy_problems()
        assert "which is no installed package. Check the spelling." in said
        assert "pip install" not in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
    ids=["exits", "raises", "lacks another"],
)
def test_a_module_that_cannot_be_imported_is_named(source: str, reason: str, installed):
    installed("stranger", source)
    [said] = OptimizerOptions(optimizer_type="stranger.Own").heavy_problems()
    assert f"needs 'stranger', which cannot be imported ({reason})" in said
    assert "pip install" not in said


@pytest.mark.parametrize(("how", "reason"), [("construct", "KeyError: 'missing'"), ("step", "division by zero")])
def test_whatever_a_strangers_class_raises_is_one_line(how: str, reason: str, installed):
    installed("stranger", CLASS)
    assert list(OptimizerOptions(optimizer_type="stranger.Own").heavy_problems()) == []
    [said] = OptimizerOptions(optimizer_type="stranger.Own", optimizer_args=[f"how='{how}'"]).heavy_problems()
    assert reason in said
    assert said.startswith("--optimizer_type stranger.Own ")


# -- optimizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer_type", "expected"),
    [("", torch.optim.AdamW), ("adamw", torch.optim.AdamW), ("torch.optim.RAdam", torch.optim.RAdam)],
)
def test_names_lead_to_classes_in_any_case(optimizer_type: str, expected: type):
    options = OptimizerOptions(optimizer_type=optimizer_type, learning_rate=1e-3)
    assert type(make_optimizer(one_group(), options)) is expected


def test_the_name_sgdnesterov_sets_momentum_unless_it_is_given():
    options = OptimizerOptions(optimizer_type="SGDNesterov")
    assert make_optimizer(one_group(), options).defaults["momentum"] == 0.9
    options = OptimizerOptions(optimizer_type="SGDNesterov", optimizer_args=["momentum=0.5"])
    defaults = make_optimizer(one_group(), options).defaults
    assert (defaults["momentum"], defaults["nesterov"]) == (0.5, True)


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.name)
def test_every_optimizer_is_made_or_its_package_asked_for(kind: OptimizerKind):
    args = ADAFACTOR_ARGS if kind.name == "Adafactor" else []
    options = OptimizerOptions(optimizer_type=kind.name.upper(), optimizer_args=args, learning_rate=1.0)
    if importlib.util.find_spec(kind.module.partition(".")[0]):
        assert type(make_optimizer(one_group(1.0), options)) is kind.load()
        assert [*options.problems(), *options.heavy_problems()] == []
    else:
        with pytest.raises(UserError, match=f"Run: python -m pip install {kind.package}"):
            make_optimizer(one_group(1.0), options)


def test_a_missing_or_old_package_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "dadaptation", None)
    [said] = OptimizerOptions("DAdaptAdam").heavy_problems()
    assert "--optimizer_type DAdaptAdam needs 'dadaptation', which cannot be imported" in said
    assert said.endswith("Run: python -m pip install dadaptation")
    monkeypatch.setitem(sys.modules, "dadaptation", ModuleType("dadaptation"))
    [said] = OptimizerOptions("DAdaptAdam").heavy_problems()
    assert said.endswith("which has no DAdaptAdam. Run: python -m pip install --upgrade dadaptation")
    [said] = OptimizerOptions("DAdaptAdan ").problems()
    assert "It must be one of DAdaptAdan, " in said


def test_every_package_of_an_optimizer_is_in_the_requirements():
    folder = Path(__file__).parents[2]
    lines = "\n".join((folder / name).read_text() for name in ("requirements.txt", "requirements-optimizers.txt"))
    assert {kind.package for kind in OPTIMIZERS} <= set(re.findall(r"^[\w-]+", lines, re.MULTILINE))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (OptimizerOptions(learning_rate=-1), "--learning_rate is -1; it must be 0 or more"),
        (OptimizerOptions(learning_rate_te2=float("inf")), "--learning_rate_te2 is inf"),
        (OptimizerOptions(max_grad_norm=-1), "--max_grad_norm is -1"),
        (OptimizerOptions(block_lr="1e-5,1e-5"), "--block_lr has 2 rates. Pass 23"),
        (OptimizerOptions(block_lr="1e-5,fast"), "--block_lr: could not convert string to float: 'fast'"),
        (OptimizerOptions(block_lr=",".join(["-1"] * 23)), "Every rate must be a number from 0 to 1000"),
        (OptimizerOptions(block_lr=",".join(["1"] * 23), learning_rate=0), "--block_lr has no effect"),
        (OptimizerOptions(optimizer_type="AdamX"), "--optimizer_type is 'AdamX'. It must be one of AdamW, "),
        (OptimizerOptions(optimizer_type="prodigee"), "It must be one of Prodigy, AdamW, "),
        (
            OptimizerOptions(optimizer_type="nowhere.to.Be"),
            "nowhere.to.Be: 'nowhere' is not installed. Check the spell",
        ),
        (
            OptimizerOptions(optimizer_args=["foreach=True", "fused=True"]),
            "AdamW refuses its arguments: RuntimeError: ",
        ),
        (OptimizerOptions(optimizer_args=["betas=[]"]), "AdamW refuses its arguments: "),
        (OptimizerOptions(optimizer_args=["betas=[0.9]"]), "AdamW refuses its arguments: "),
        (
            OptimizerOptions(optimizer_type="torch.optim.SGD", optimizer_args=["foreach=True", "fused=True"]),
            "SGD refuses",
        ),
        (OptimizerOptions(optimizer_type="torch.optim.AdamX"), "has no attribute 'AdamX'"),
        (OptimizerOptions(optimizer_type="torch.nn.Linear"), "torch.nn.Linear is not an optimizer"),
        (OptimizerOptions(optimizer_type="torch.optim.LBFGS"), "LBFGS computes the loss several times in a step"),
        (OptimizerOptions(optimizer_args=["weight_decay"]), "'weight_decay' is not understood"),
        (OptimizerOptions(optimizer_args=["decay=1", "rho=2"]), "AdamW does not take decay, rho. It takes betas, eps"),
        (OptimizerOptions(optimizer_args=["lr=1"]), "'lr' is set by --learning_rate"),
        (OptimizerOptions(optimizer_args=["betas=3"]), "AdamW refuses its arguments"),
        (OptimizerOptions(optimizer_args=["weight_decay=-1"]), "AdamW refuses its arguments: Invalid weight_decay"),
    ],
)
def test_options_that_cannot_work_are_named_before_anything_is_loaded(options: OptimizerOptions, expected: str):
    [problem] = problems_of(options) or list(options.heavy_problems())
    assert expected in problem


@pytest.mark.parametrize("learning_rate", [1e-5, 0.01])
def test_adafactor_takes_the_steps_of_the_reference(learning_rate: float):
    golden = np.load(GOLDEN)
    trained = {name: Parameter(torch.from_numpy(golden[f"init_{name}"])) for name in TENSORS}
    options = OptimizerOptions(
        optimizer_type="Adafactor",
        optimizer_args=[*ADAFACTOR_ARGS, "weight_decay=0.01"],
        learning_rate=learning_rate,
    )
    groups = [{"name": "unet", "params": list(trained.values()), "lr": learning_rate}]
    optimizer = make_optimizer(groups, options)
    for step in range(5):
        for name, parameter in trained.items():
            parameter.grad = torch.from_numpy(golden[f"grad{step}_{name}"])
        optimizer.step()
        for name, parameter in trained.items():
            expected = golden[f"lr{learning_rate}_unfused_fp32_step{step + 1}_{name}"]
            # The same float32 formula; sums may be ordered otherwise on another machine: a few units in the last place.
            np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-6, atol=1e-7)
