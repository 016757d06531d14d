"""A command that is written on the page: fields to values, what is wrong at which field, what it would train."""

import shlex
from pathlib import Path

import pytest

from library.config.config_file import read_config_file
from library.config.errors import UserError
from library.config.kohya_spellings import TRAINER_SPELLINGS
from library.config.option_form import form_of, problems_by_field, typed_of, values_of
from library.config.options import options_of, parse_options
from library.data.data_set_form import data_set_form, data_set_of, text_of_data_set, typed_of_data_set
from library.data.dataset_schema import read_tables
from library.runs.command_check import LEFT_OUT, Command, checked, written
from library.runs.command_summary import command_summary
from library.runs.command_text import arguments_of, shown_commands, toml_of
from library.runs.presets import preset_names, read_preset
from library.sdxl.architecture import SDXL_BASE
from library.training.card_memory import GIB, Batch, CardMemory
from library.training.run_options import OPTION_CLASSES, TrainingOptions
from tests.test_readme import recipes

OPTIONS = {each.name: each for option_class in OPTION_CLASSES for each in options_of(option_class)}


@pytest.fixture
def right(prepared_set, tiny_sdxl, tmp_path):
    return {
        "pretrained_model_name_or_path": str(tiny_sdxl),
        "in_json": str(prepared_set.latents_json),
        "train_data_dir": str(prepared_set.images),
        "output_dir": str(tmp_path / "output"),
        "resolution": "128,128",
        "min_bucket_reso": "64",
        "max_bucket_reso": "256",
    }


def test_every_option_but_secrets_and_a_few_is_a_field():
    fields = {field["name"]: field for group in form_of(OPTION_CLASSES, LEFT_OUT) for field in group["fields"]}
    secrets = {name for name, option in OPTIONS.items() if option.is_secret}
    assert fields.keys() == OPTIONS.keys() - secrets - LEFT_OUT
    assert all(field["help"] for field in fields.values())
    assert fields["save_every_n_minutes"]["expects"] == "a whole number, 1 or more, minutes"
    assert fields["caption_dropout_rate"]["expects"].endswith("0 to 1")
    assert (fields["ema"]["kind"], fields["loss_type"]["kind"], fields["optimizer_args"]["kind"]) == (
        "switch",
        "choice",
        "list",
    )


def test_only_what_differs_from_its_default_is_written_and_read_back():
    typed = {
        "learning_rate": "1e-5",
        "max_train_steps": "1600",  # the default
        "enable_bucket": False,  # the default
        "sdpa": "",
        "ema": True,
        "lr_warmup_steps": "10%",
        "optimizer_args": ["weight_decay=0.1", "betas=0.9,0.99"],
        "output_name": "a 'b' $(c); \"d\"",
    }
    values, problems = values_of(OPTION_CLASSES, typed, LEFT_OUT)
    assert problems == {} and not values.keys() & {"max_train_steps", "enable_bucket", "sdpa"}
    assert values_of(OPTION_CLASSES, typed_of(values), LEFT_OUT) == (values, {})


def test_the_toml_and_the_commands_hold_the_same(tmp_path: Path):
    values = {
        "output_name": "a 'b' $(c); \"d\" & \\",
        "learning_rate": 1e-5,
        "ema": True,
        "enable_bucket": False,
        "optimizer_args": ["weight_decay=0.1", "betas=0.9,0.99"],
    }
    file = tmp_path / "run.toml"
    file.write_text(toml_of(values), encoding="utf-8")
    assert read_config_file(file, list(OPTIONS.values()), TRAINER_SPELLINGS) == values
    assert shlex.split(shown_commands(values)["posix"])[2:] == arguments_of(values)
    assert arguments_of(values)[0] == "--output_name=a 'b' $(c); \"d\" & \\"


def test_what_is_no_value_is_told_at_its_field():
    typed = {
        "learning_rate": "fast",
        "max_train_steps": "-3",
        "ema": 3,
        "no_such": "1",
        "wandb_api_key": "x",
        "config_file": "y",
    }
    values, problems = values_of(OPTION_CLASSES, typed, LEFT_OUT)
    assert values == {} and problems.keys() == typed.keys()
    assert "must be 0 or more" in problems["max_train_steps"]


def test_a_conflict_stands_at_both_of_its_fields(right):
    found = checked(Command({**right, "fused_backward_pass": True, "gradient_accumulation_steps": 4}), is_draft=True)
    assert found.of_field.keys() == {"fused_backward_pass", "gradient_accumulation_steps"}
    assert checked(Command(right), is_draft=True).is_right
    at, others = problems_by_field(["--a needs --b; add it.", "the disk is full"], {"a", "b"}, {"a"})
    assert (list(at), others) == (["a"], ["the disk is full"])


def test_what_the_trainer_would_refuse_is_refused(right):
    missing = {name: value for name, value in right.items() if name != "output_dir"}
    assert "output_dir" in checked(Command(missing), is_draft=True).of_field
    gone = checked(Command({**right, "train_data_dir": "/no/such/folder"}), is_draft=True)
    assert not gone.is_right
    unknown = checked(Command({**right, "lr_scheduler": "no such"}), is_draft=False)
    assert "lr_scheduler" in unknown.of_field


def test_a_data_set_is_written_and_its_mistakes_are_told_at_their_keys(right, prepared_set):
    typed = {
        "general": {"enable_bucket": "true", "caption_dropout_rate": "0.1"},
        "datasets": [
            {"keys": {"resolution": "128"}, "subsets": [{"image_dir": str(prepared_set.images), "num_repeats": "0"}]},
        ],
    }
    base = {name: value for name, value in right.items() if name not in ("in_json", "train_data_dir")}
    found = written(typed_of(base), typed)
    assert found.is_right
    wrong = checked(found.command, is_draft=True)
    assert list(wrong.of_field) == ["subsets.0.num_repeats"] and wrong.others == []
    typed["datasets"][0]["subsets"][0]["num_repeats"] = "2"
    found = written(typed_of(base), typed)
    assert checked(found.command, is_draft=True).is_right
    titles = dict(command_summary(found.command))
    assert titles["Images"][0].startswith("3 in ")
    assert any("L from *.txt" in line for line in titles["Captions"])
    assert not written({}, {"general": 3}).is_right
    assert not written({}, {"general": {}, "datasets": [{"keys": {"resolution": 3}, "subsets": []}]}).is_right


def test_the_summary_says_what_would_be_trained_without_a_model(right, tmp_path):
    values = {**right, "save_every_n_steps": 2, "max_train_steps": 6, "save_state": True}
    del values["pretrained_model_name_or_path"]
    parts = dict(command_summary(Command({**values, "pretrained_model_name_or_path": "somebody/model"})))
    assert list(parts) == ["Images", "Steps", "Trained", "Captions", "GPU memory", "Disk"]
    assert parts["Steps"] == ["6 in 2 epochs of 3"]
    assert parts["Trained"][0].startswith("trained: U-Net; frozen: L, G")
    assert parts["Disk"][0].startswith("4 models of about 6.46 GiB, and 4 states")
    assert not (tmp_path / "output").exists()
    with pytest.raises(UserError):
        command_summary(Command({**values, "pretrained_model_name_or_path": "a/b", "in_json": "gone.json"}))


@pytest.mark.parametrize("heading", recipes())
def test_the_memory_of_a_recipe_is_that_of_its_heading(heading, tmp_path):
    for name in ("m.json", "m.safetensors"):
        (tmp_path / name).write_text("{}")
    model, meta = (f"{tmp_path}/m{suffix}" for suffix in (".safetensors", ".json"))
    flags = [f"--pretrained_model_name_or_path={model}", "--train_data_dir=.", f"--in_json={meta}", "--output_dir=o"]
    argv = [*flags, "--resolution=1024,1024", *shlex.split(recipes()[heading])]
    options = TrainingOptions(
        *parse_options(OPTION_CLASSES, argv, description="", spellings=TRAINER_SPELLINGS, is_draft=True)
    )
    batch = Batch(options.loader.train_batch_size, 1024 * 1024)
    total = CardMemory(SDXL_BASE, []).total(options, batch) / GIB
    expected = float(heading.partition("(")[2].split()[0])
    assert total == pytest.approx(expected, abs=0.25)


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_fills_fields_that_are_right(name, tmp_path, monkeypatch):
    preset = read_preset(name, "my folder")
    assert preset.options["output_dir"] == "my folder/output"
    found = written(typed_of(preset.options), typed_of_data_set(preset.data_set))
    assert found.is_right and found.command.values == preset.options
    file = tmp_path / "set.toml"
    file.write_text(text_of_data_set(data_set_of(typed_of_data_set(preset.data_set))), encoding="utf-8")
    general, datasets = read_tables(file)
    assert general == preset.data_set["general"]
    assert [subsets for _, subsets in datasets] == [table["subsets"] for table in preset.data_set["datasets"]]


def test_presets_are_the_examples():
    assert len(preset_names()) == 9 and "style/16gb" in preset_names()
    with pytest.raises(UserError, match="no preset"):
        read_preset("../style/16gb", "x")
    assert {each["name"] for each in data_set_form()["subsets"]} > {
        "image_dir",
        "num_repeats",
        "caption_dropout_rate_l",
    }
