"""From flags and TOML files to option classes."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from library.config.errors import UserError
from library.config.options import ConfigFileOptions, option, parse_options, positional
from library.config.spellings import Spellings


@dataclass(frozen=True)
class ModelOptions:
    _argument_group_name: ClassVar[str] = "Model"

    model: str = option("", "Checkpoint to start from.")
    vae: Path | None = option(None, "VAE in place of the checkpoint's own.", aliases=["--vae_path"])
    mixed_precision: str = option("no", "Precision of 90% of the work.", choices=["no", "fp16", "bf16"])
    max_token_length: int | None = option(None, "Tokens.", choices=[150, 225])
    sdpa: bool = option(False, "Fast attention.")


@dataclass(frozen=True)
class StepOptions:
    _argument_group_name: ClassVar[str] = "Learning rate and steps"

    learning_rate: float = option(1e-5, "Rate.")
    max_train_epochs: int | None = option(8, "Epochs.")
    optimizer_type: str = option("AdamW", "Optimizer.")
    optimizer_args: list[str] = option(["a=1"], "Arguments.")

    def problems(self) -> Iterator[str]:
        if self.learning_rate < 0:
            yield f"--learning_rate is {self.learning_rate}; give 0 or more."
        if self.max_train_epochs == 0:
            yield "--max_train_epochs is 0; give 1 or more."


@dataclass(frozen=True)
class FolderOptions:
    _argument_group_name: ClassVar[str] = "Folders"

    images: Path = positional("Folder of the images.")
    out_json: Path = positional("File to write.")
    recursive: bool = option(False, "Subfolders too.")


CLASSES = (ModelOptions, StepOptions, ConfigFileOptions)
REPLACED = {"--use_8bit_adam": "--optimizer_type=AdamW8bit", "--xformers": "--sdpa", "--modle": "--model"}
REFUSED = {"--v2": "belongs to another model. Leave it off.", "--lowram": "does nothing here. Leave it off."}


def parse(*argv, classes=CLASSES, **more):
    return parse_options(classes, argv, description="Test.", spellings=Spellings(REPLACED, REFUSED), **more)


def message(*argv, **more):
    with pytest.raises(UserError) as caught:
        parse(*argv, **more)
    return str(caught.value)


@pytest.mark.parametrize("value", ["BF16", "bf16", "Bf16"])
def test_a_choice_is_taken_in_any_case(value: str, tmp_path: Path):
    assert parse(f"--mixed_precision={value}")[0].mixed_precision == "bf16"
    file = tmp_path / "options.toml"
    file.write_text(f'mixed_precision = "{value}"', encoding="utf-8")
    assert parse(f"--config_file={file}")[0].mixed_precision == "bf16"


@pytest.fixture
def write_toml(tmp_path):
    def write(text, name="my options.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return f"--config_file={path}"

    return write


# -- the command line -------------------------------------------------------------------------------------------------


def test_without_arguments_every_option_has_its_default():
    assert parse() == (ModelOptions(), StepOptions(), ConfigFileOptions())


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--model", "a b.safetensors"], "model", "a b.safetensors"),
        (["--model=--e=x"], "model", "--e=x"),
        ([r"--model=C:\my set\new\table.safetensors"], "model", r"C:\my set\new\table.safetensors"),
        ([r"--vae=C:\my set\new vae"], "vae", Path(r"C:\my set\new vae")),
        (["--vae_path", "x"], "vae", Path("x")),
        (["--vae=x", "--vae=None"], "vae", None),
        (["--vae=x", "--vae="], "vae", None),
        (["--max_train_epochs=6.0"], "max_train_epochs", 6),
        (["--use_8bit_adam=1"], "optimizer_type", "AdamW8bit"),
        (["--use_8bit_adam=false"], "optimizer_type", "AdamW"),
        (["--max_token_length", "225"], "max_token_length", 225),
        (["--max-token-length=None"], "max_token_length", None),
        (["--mixed_precision=bf16"], "mixed_precision", "bf16"),
        (["--sdpa"], "sdpa", True),
        (["--sdpa=false"], "sdpa", False),
        (["--sdpa=True", "--model", "m"], "sdpa", True),
        (["--learning_rate", "1e-4"], "learning_rate", 1e-4),
        (["--learning_rate", "0.5", "--learning_rate", "2"], "learning_rate", 2.0),
        (["--max_train_epochs=None"], "max_train_epochs", None),
        (
            ["--optimizer_args", "betas=0.9,0.99", "eps=1e-8", "--sdpa"],
            "optimizer_args",
            ["betas=0.9,0.99", "eps=1e-8"],
        ),
        (["--optimizer_args"], "optimizer_args", []),
        (["--use_8bit_adam"], "optimizer_type", "AdamW8bit"),
        (["--use-8bit-adam", "--optimizer_type=AdamW8bit"], "optimizer_type", "AdamW8bit"),
        (["--xformers"], "sdpa", True),
        (["--modle", "m"], "model", "m"),
        (["--modle=m"], "model", "m"),
    ],
)
def test_a_flag_gives_its_value(argv, name, value):
    model, steps, _ = parse(*argv)
    assert getattr(model if hasattr(model, name) else steps, name) == value


def test_a_switch_does_not_swallow_the_argument_behind_it():
    (folders,) = parse("--recursive", "my set/images", "meta.json", classes=[FolderOptions])
    assert folders == FolderOptions(Path("my set/images"), Path("meta.json"), recursive=True)


def test_what_stands_behind_a_double_dash_is_positional():
    (folders,) = parse("--recursive", "--", "--images", "meta.json", classes=[FolderOptions])
    assert folders == FolderOptions(Path("--images"), Path("meta.json"), recursive=True)


def test_without_argv_the_arguments_of_the_process_are_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--model=m"])
    assert parse_options(CLASSES, None, description="Test.")[0].model == "m"


def test_an_args_file_beside_the_script_is_not_read(monkeypatch, tmp_path):
    (tmp_path / "train.args").write_text("--model from_file", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py")])
    assert parse_options(CLASSES, None, description="Test.")[0].model == ""


def test_help_ends_with_status_0_and_shows_groups_defaults_and_underscores_only(capsys):
    with pytest.raises(SystemExit) as ending:
        parse("--help")
    shown = capsys.readouterr().out
    assert ending.value.code == 0
    for text in ("Test.", "Learning rate and steps:", "--max_train_epochs", "(default: 8)", "{no,fp16,bf16}", "90% of"):
        assert text in shown
    assert "--max-train-epochs" not in shown


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--learning_rat", "1"], "unknown flag --learning_rat. Did you mean --learning_rate?"),
        (["--optimiser_type=x"], "unknown flag --optimiser_type. Did you mean --optimizer_type?"),
        (["--qqq"], "unknown flag --qqq. See --help."),
        (["--learning_rate=--"], "--learning_rate is '--', which is no value."),
        (["--sdpa=--"], "--sdpa is '--', which is no value."),
        (["--learning_rate", "fast"], "--learning_rate expects a number, not 'fast'."),
        (["--max_train_epochs=1.5"], "--max_train_epochs expects a whole number or None, not '1.5'."),
        (["--mixed_precision=bf61"], "--mixed_precision expects one of no, fp16, bf16, not 'bf61'."),
        (["--max_token_length=75"], "--max_token_length expects one of 150, 225 or None, not 75."),
        (["--learning_rate="], "--learning_rate expects a number, not ''."),
        (["--sdpa=maybe"], "--sdpa expects true or false, not 'maybe'."),
        (["--sdpa", "false"], "unexpected argument 'false'."),
        (["--model"], "--model: expected one argument."),
        (["my", "set"], "unexpected argument 'my'."),
        (["--v2"], "--v2: belongs to another model. Leave it off."),
        (["--use_8bit_adam=x"], "--use_8bit_adam takes no value: it means --optimizer_type=AdamW8bit."),
        (["--use_8bit_adam", "--optimizer_type=Lion"], "but --optimizer_type is Lion as well."),
        (["--output_config"], "--output_config needs --config_file"),
    ],
)
def test_a_mistake_is_named_with_its_flag(argv, expected):
    assert expected in message(*argv)


def test_a_missing_positional_argument_is_named():
    assert "required: out_json" in message("images", classes=[FolderOptions])


def test_all_unknown_and_refused_flags_are_named_at_once():
    lines = message("--v2", "--model=m", "--lowram", "--learning_rte=1").splitlines()
    assert lines[0] == "3 problems with the options:"
    assert [line.split()[0] for line in lines[1:]] == ["--v2:", "--lowram:", "unknown"]


def test_problems_of_the_classes_and_conflicts_between_them_are_reported_together():
    def conflicts(model, steps, config):
        if model.sdpa and steps.learning_rate < 0:
            yield "--sdpa does not work with that rate."

    lines = message("--sdpa", "--learning_rate=-1", "--max_train_epochs=0", conflicts=conflicts).splitlines()
    assert [line.strip() for line in lines[1:]] == [
        "--learning_rate is -1.0; give 0 or more.",
        "--max_train_epochs is 0; give 1 or more.",
        "--sdpa does not work with that rate.",
    ]


def test_what_needs_torch_is_checked_only_if_nothing_else_is_wrong():
    @dataclass(frozen=True)
    class Heavy:
        steps: int = option(1, "Steps.")

        def problems(self):
            if self.steps < 0:
                yield "--steps is negative."

        def heavy_problems(self):
            yield "no device can do that."

    assert message("--steps=-1", classes=[Heavy]) == "--steps is negative."
    assert message("--steps=1", classes=[Heavy], conflicts=lambda heavy: ["a conflict."]) == "a conflict."
    assert message("--steps=1", classes=[Heavy]) == "no device can do that."


# -- the TOML file ----------------------------------------------------------------------------------------------------


def test_the_file_overrides_defaults_and_the_command_line_overrides_the_file(write_toml):
    file = write_toml('model = "from file"\nlearning_rate = 0.5\nmax_train_epochs = 3')
    model, steps, _ = parse(file, "--max_train_epochs=4", "--sdpa")
    assert (model.model, model.sdpa, model.mixed_precision) == ("from file", True, "no")
    assert (steps.learning_rate, steps.max_train_epochs) == (0.5, 4)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("['any heading']\nlearning_rate = 2", "learning_rate", 2.0),
        ("max_train_epochs = 'None'", "max_train_epochs", None),
        (r"vae = 'C:\my set\new'", "vae", Path(r"C:\my set\new")),
        ("vae_path = 'x'", "vae", Path("x")),
        ("optimizer_args = ['a=1', 'b=2']", "optimizer_args", ["a=1", "b=2"]),
        ("sdpa = true", "sdpa", True),
        ("use_8bit_adam = true", "optimizer_type", "AdamW8bit"),
        ("use_8bit_adam = false", "optimizer_type", "AdamW"),
        ("xformers = true\nsdpa = false", "sdpa", True),
        ("sdpa = true\nxformers = false", "sdpa", True),
        ("v2 = false\nlowram = 0\nmodel = 'm'", "model", "m"),
        ("\ufeffmodel = 'Kätzchen 猫'", "model", "Kätzchen 猫"),
    ],
)
def test_a_key_gives_its_value(write_toml, text, name, value):
    model, steps, _ = parse(write_toml(text))
    assert getattr(model if hasattr(model, name) else steps, name) == value


def test_the_command_line_overrides_an_old_spelling_in_the_file(write_toml):
    assert parse(write_toml("use_8bit_adam = true"), "--optimizer_type=Lion")[1].optimizer_type == "Lion"


def test_the_suffix_of_the_file_may_be_left_off(write_toml):
    assert parse(write_toml("model = 'm'").removesuffix(".toml"))[0].model == "m"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rte = 1", "unknown key 'learning_rte'. Did you mean learning_rate?"),
        ("learning_rate = 'fast'", "learning_rate expects a number, not 'fast'."),
        ("learning_rate = true", "learning_rate expects a number, not True."),
        ("max_train_epochs = 1.5", "max_train_epochs expects a whole number or None, not 1.5."),
        ("model = 1.5", "model expects text, not 1.5."),
        ("model = true", "model expects text, not True."),
        ("sdpa = 'maybe'", "sdpa expects true or false, not 'maybe'."),
        ("sdpa = 2", "sdpa expects true or false, not 2."),
        ("mixed_precision = 'bf61'", "expects one of no, fp16, bf16, not 'bf61'."),
        ("optimizer_args = 'a=1'", "optimizer_args expects a list in square brackets, not 'a=1'."),
        ("optimizer_args = [1]", "optimizer_args expects text, not 1."),
        ("vae = 1", "vae expects a path or None, not 1."),
        ("v2 = true", "v2: belongs to another model."),
        ("config_file = 'x'", "config_file: is read from the command line only"),
        ("use_8bit_adam = true\noptimizer_type = 'Lion'", "'optimizer_type' says 'Lion' where another key says"),
        ("[a]\nlearning_rate = 1\n[b]\nlearning_rate = 2", "'learning_rate' says 2.0 where another key says"),
        ("[a.b]\nlearning_rate = 1", "the section 'a' holds another section 'b'"),
        ('vae = "C:\\my set"', "is not valid TOML"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_key_and_file(write_toml, text, expected):
    shown = message(write_toml(text))
    assert expected in shown
    assert "my options.toml" in shown


def test_every_mistake_in_the_file_is_named_at_once(write_toml):
    assert len(message(write_toml("v2 = true\nqqq = 1\nmodel = 1.5")).splitlines()) == 4


def test_a_missing_file_and_one_that_is_not_utf8_are_named(tmp_path):
    assert "cannot read" in message(f"--config_file={tmp_path / 'none'}")
    (tmp_path / "latin.toml").write_bytes("model = 'é'".encode("latin-1"))
    assert "latin.toml' is not UTF-8 text" in message(f"--config_file={tmp_path / 'latin.toml'}")


def test_problems_are_found_in_values_from_the_file_too(write_toml):
    assert message(write_toml("learning_rate = -1")) == "--learning_rate is -1.0; give 0 or more."


# -- writing the TOML file --------------------------------------------------------------------------------------------


def test_the_written_file_gives_the_same_options_again(tmp_path, capsys):
    flag = f"--config_file={tmp_path / 'new é'}"
    argv = [r"--vae=C:\my set\new", "--max_train_epochs=None", "--optimizer_args", 'a="b"', "c=[1]", "--sdpa"]
    with pytest.raises(SystemExit) as ending:
        parse(*argv, flag, "--output_config")
    assert ending.value.code == 0
    assert str(tmp_path / "new é.toml") in capsys.readouterr().out
    assert parse(flag)[:2] == parse(*argv)[:2]


def test_an_existing_file_is_not_overwritten(write_toml, tmp_path):
    flag = write_toml("model = 'old'")
    assert "exists already" in message(flag, "--output_config", "--model=new")
    assert (tmp_path / "my options.toml").read_text(encoding="utf-8") == "model = 'old'"


@dataclass(frozen=True)
class WithSecret:
    """An option that must be written nowhere."""

    _argument_group_name: ClassVar[str] = "Secrets"

    api_token: str | None = option(None, "A token.", secret=True)
    name: str | None = option(None, "A name.")


def test_a_secret_is_not_written_to_a_config_file(tmp_path: Path):
    path = tmp_path / "run.toml"
    argv = ["--api_token=abc", "--name=n", f"--config_file={path}", "--output_config"]
    with pytest.raises(SystemExit):
        parse_options([WithSecret, ConfigFileOptions], argv, description="")
    assert "abc" not in path.read_text(encoding="utf-8")
    assert 'name = "n"' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("given", [["--api_token=abc"], ["--api_token", "abc"], ["--api-token=abc"]])
def test_a_secret_does_not_stay_among_the_arguments_of_the_process(given, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *given, "--name=n"])
    (options,) = parse_options([WithSecret], None, description="")
    assert (options.api_token, options.name) == ("abc", "n")
    assert not [argument for argument in sys.argv if "abc" in argument]
    assert sys.argv[-1] == "--name=n"
