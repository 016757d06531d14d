"""What asks for nothing is read, silently: on the command line, in TOML and in JSON."""

import json
from pathlib import Path

import pytest
import tomli_w

from library.captions.options import resolve
from library.config.errors import UserError
from library.config.kohya_flags import TRAINER_REFUSED, TRAINER_REPLACED
from library.config.kohya_spellings import NEUTRAL, NEUTRAL_REFUSED, TRAINER_SPELLINGS
from library.config.options import options_of, parse_options
from library.config.value_kinds import NumSteps
from library.training.run_options import OPTION_CLASSES, TrainingOptions
from tests.conftest import base_flags

REFERENCE = json.loads((Path(__file__).parents[1] / "golden" / "cli_flags.json").read_text(encoding="utf-8"))
DEFAULTS = REFERENCE["sdxl_train_2026"]
LISTS = ("--optimizer_args", "--lr_scheduler_args")
NOT_COMPARED = {"--config_file"}  # names the file itself


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A folder with all that options are checked against; the flags that every run needs."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Path("meta.json").write_text('{"01": {"captionL": "", "captionG": ""}}', encoding="utf-8")
    Path("model.safetensors").write_bytes(b"no model")
    return base_flags("model.safetensors", "meta.json", "images", "output")


def parsed(*argv: str) -> TrainingOptions:
    return TrainingOptions(
        *parse_options(
            OPTION_CLASSES,
            argv,
            description="",
            spellings=TRAINER_SPELLINGS,
            conflicts=lambda *classes: TrainingOptions(*classes).conflicts(),
        )
    )


def without_file(options: TrainingOptions) -> list:
    """What options come to, however it was said: captions by their rules, which alone have an effect with --in_json."""
    others = [value for name, value in vars(options).items() if name not in ("config_file", "captions")]
    return [*others, resolve([vars(options.captions)])]


def spellings_of_default(flag: str, default: object) -> list[list[str]]:
    """The arguments that say on the command line what leaving the flag out says in the reference."""
    if flag in LISTS:
        return [[flag], [f"{flag}="]]
    if default is None:
        return [[f"{flag}=None"], [f"{flag}="], [flag, "None"]]
    if default is False:
        return [[f"{flag}=false"], [f"{flag}=0"]]
    return [[f"{flag}={default}"], [flag, str(default)]]


@pytest.mark.parametrize("flag", DEFAULTS)
def test_every_flag_of_the_reference_at_its_default_is_read_silently(flag: str, in_folder: list[str], capsys):
    default = DEFAULTS[flag]
    plain = without_file(parsed(*in_folder))
    if flag == "--console_log_simple":  # a switch that is on here, off there
        plain = without_file(parsed(*in_folder, "--console_log_simple=false"))
    for arguments in spellings_of_default(flag, default):
        assert without_file(parsed(*arguments, *in_folder)) == plain
    name = flag[2:]
    for written in [default] if default is not None else ["", "None"]:
        if flag in LISTS and written == "None":
            written = []
        Path("options.toml").write_text(tomli_w.dumps({name: written}), encoding="utf-8")
        assert without_file(parsed("--config_file=options.toml", *in_folder)) == plain
    Path("options.json").write_text(json.dumps({name: default}), encoding="utf-8")
    assert without_file(parsed("--config_file=options.json", *in_folder)) == plain
    assert capsys.readouterr() == ("", "")


ASKING_FOR_NOTHING = [
    'loss_type = "l2"',
    "clip_skip = 1",
    'clip_skip = "1"',
    "max_token_length = 75",
    'max_token_length = "75"',
    'dynamo_backend = "no"',
    'vae = ""',
    'resume = ""',
    'noise_offset_type = "Original"',
    'noise_offset_type = "Multires"',
    "prior_loss_weight = 1",
    "min_snr_gamma = 0",
    "min_snr_gamma = 0.0",
    'min_snr_gamma = "0"',
    "ip_noise_gamma = false",
    "network_args = []",
    "lr_scheduler_args = []",
    "optimizer_args = []",
    "save_every_n_steps = 0",
    "save_last_n_steps = 0",
    "save_last_n_epochs_state = 0",
    "max_train_epochs = 0",
    "adaptive_noise_scale = 0",
    "persistent_data_loader_workers = 0",
    "full_bf16 = 'false'",
    "xformers = true\nsdpa = false",
    "sdpa = false\nxformers = true",
    "mem_eff_attn = 0\nsdpa = false",
    "learning_rate_te1 = 1e-5\nlearning_rate_te2 = 1e-5",
    "use_8bit_adam = 0",
    "fused_optimizer_groups = 0",
    "sdxl = true",
    'dataset_config = ""',
    'lr_scheduler_power = ""',
]


@pytest.mark.parametrize("text", ASKING_FOR_NOTHING)
def test_what_asks_for_nothing_in_a_file_changes_nothing(text: str, in_folder: list[str], capsys):
    Path("options.toml").write_text(text, encoding="utf-8")
    assert without_file(parsed("--config_file=options.toml", *in_folder)) == without_file(parsed(*in_folder))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--min_snr_gamma=0"],
        ["--min_snr_gamma", "0"],
        ["--min-snr-gamma", "0.0"],
        ["--loss_type", "l2"],
        ["--loss_type=L2"],
        ["--clip_skip", "1"],
        ["--v2=false"],
        ["--save_every_n_steps", "0"],
        ["--max_token_length", "75"],
        ["--dynamo_backend=no"],
        ["--vae="],
        ["--resume", ""],
        ["--network_args"],
        ["--network_dim=0"],
        ["--use_8bit_adam=false"],
        ["--fused_optimizer_groups", "0"],
        ["--sdpa=false"],
        ["--xformers=false"],
        ["--full_bf16="],
    ],
    ids=" ".join,
)
def test_what_asks_for_nothing_on_the_command_line_changes_nothing(arguments: list[str], in_folder: list[str], capsys):
    assert without_file(parsed(*arguments, *in_folder)) == without_file(parsed(*in_folder))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("arguments", [["--min_snr_gamma", "0"], ["--save_every_n_steps=0"], ["--vae="]], ids=" ".join)
def test_off_on_the_command_line_overrides_the_file(arguments: list[str], in_folder: list[str]):
    Path("options.toml").write_text("save_every_n_steps = 100\nvae = 'model.safetensors'", encoding="utf-8")
    options = parsed("--config_file=options.toml", *in_folder, *arguments)
    assert (options.save.save_every_n_steps, options.model.vae) == {
        "--min_snr_gamma": (100, "model.safetensors"),
        "--save_every_n_steps=0": (None, "model.safetensors"),
        "--vae=": (100, None),
    }[arguments[0]]


@pytest.mark.parametrize(
    ("flag", "value"),
    [("clip_skip", "3"), ("zero_stage", "3"), ("factor", "4"), ("network_dim", "8"), ("v2", "true")],
)
def test_any_other_value_of_a_refused_flag_has_its_reason(flag: str, value: str, in_folder: list[str]):
    Path("options.toml").write_text(f"{flag} = {value}", encoding="utf-8")
    for argv in ([f"--{flag}={value}"], [f"--{flag}", value], ["--config_file=options.toml"]):
        with pytest.raises(UserError) as caught:
            parsed(*argv, *in_folder)
        assert f"{flag}: {TRAINER_REFUSED[f'--{flag}']}" in str(caught.value)


def test_rates_of_text_encoders_in_a_file_count_once_they_are_trained(in_folder: list[str]):
    Path("options.toml").write_text("learning_rate_te1 = 1e-5\nlearning_rate_te2 = 0", encoding="utf-8")
    options = parsed("--config_file=options.toml", "--train_text_encoder", *in_folder)
    assert (options.optimizer.learning_rate_te1, options.optimizer.learning_rate_te2) == (1e-5, 0.0)
    with pytest.raises(UserError, match="--learning_rate_te1 has no effect without --train_text_encoder"):
        parsed("--learning_rate_te1=1e-5", *in_folder)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate = '1e-5'", "learning_rate", 1e-5),
        ("max_train_steps = '7'", "max_train_steps", 7),
        ("max_train_steps = 7.0", "max_train_steps", 7),
        ("max_train_steps = '7.0'", "max_train_steps", 7),
        ("seed = '3'", "seed", 3),
        ("gradient_checkpointing = 1", "gradient_checkpointing", True),
        ("gradient_checkpointing = 'true'", "gradient_checkpointing", True),
        ("resolution = 768", "resolution", "768"),
        ("lr_warmup_steps = '0.1'\nlr_scheduler = 'cosine'", "lr_warmup_steps", NumSteps(0.1)),
        ("fused_optimizer_groups = 10", "fused_backward_pass", True),
        ("fused_optimizer_groups = '10'", "fused_backward_pass", True),
        ("use_8bit_adam = 1", "optimizer_type", "AdamW8bit"),
    ],
)
def test_a_value_in_another_form_is_read_as_what_it_says(text: str, name: str, value: object, in_folder: list[str]):
    Path("options.toml").write_text(text, encoding="utf-8")
    options = parsed("--config_file=options.toml", *in_folder)
    [found] = [getattr(each, name) for each in vars(options).values() if hasattr(each, name)]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "arguments",
    [["--fused_optimizer_groups=10"], ["--fused_optimizer_groups", "10"], ["--fused_backward_pass"]],
    ids=" ".join,
)
def test_fused_optimizer_groups_are_the_fused_backward_pass(arguments: list[str], in_folder: list[str]):
    assert parsed(*in_folder, *arguments).optimizer.fused_backward_pass


def test_each_table_names_flags_of_its_kind():
    options = {each.flag for option_class in OPTION_CLASSES for each in options_of(option_class)}
    assert set(NEUTRAL) <= options
    assert set(NEUTRAL_REFUSED) <= set(TRAINER_REFUSED)
    assert not options & (set(TRAINER_REFUSED) | set(TRAINER_REPLACED))
    assert set(TRAINER_SPELLINGS.idle) | set(TRAINER_SPELLINGS.idle.values()) <= {flag[2:] for flag in options}
    assert not {f"--{key}" for key in TRAINER_SPELLINGS.file_only} & (options | set(TRAINER_REFUSED))
