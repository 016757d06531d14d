"""Documents that are made from the code agree with it."""

import importlib.util
from pathlib import Path

import pytest

from docs.how_do_i import ANSWERS, TWO_READINGS
from tests.config.test_neutral_values import in_folder, parsed  # noqa: F401 (a fixture)

REPOSITORY = Path(__file__).parents[1]


def load_script(path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_page_of_flags_is_what_the_option_classes_say():
    expected = load_script(REPOSITORY / "docs" / "write_flags.py").flags_page()
    shown = (REPOSITORY / "docs" / "flags.md").read_text(encoding="utf-8")
    assert shown == expected, "run: python docs/write_flags.py"


@pytest.mark.parametrize("answer", [*ANSWERS, *TWO_READINGS], ids=lambda answer: answer.question or answer.flags)
def test_the_flags_of_each_answer_are_those_of_the_trainer(answer, in_folder):  # noqa: F811
    Path("prompt.txt").write_text("a cat --e photographic", encoding="utf-8")
    Path("output").mkdir()
    Path("output/model.safetensors").write_bytes(b"no model")
    Path("saved.json").write_text("{}", encoding="utf-8")
    if "--output_config" in answer.flags:
        with pytest.raises(SystemExit):
            parsed(*in_folder, *answer.flags.split())
        parsed(*in_folder, "--config_file=my_run.toml")
    elif answer.flags:
        parsed(*in_folder, *answer.flags.split())


def models_kept(save_after, last: int) -> list[int]:
    """The steps or epochs whose models are there after the last of them."""
    there: dict[str, int] = {}
    for count in range(1, last + 1):
        save = save_after(count)
        if save is not None:
            there[save.name] = count
            there.pop(save.outdated, None)
    return list(there.values())


def test_the_numbers_of_kept_models_are_those_of_the_page(in_folder):  # noqa: F811
    by_step, by_epoch = (
        parsed(*in_folder, *answer.flags.split()).save for answer in TWO_READINGS if "save_last" in answer.flags
    )
    assert models_kept(by_step.save_after_step, 500) == [300, 400, 500]
    assert models_kept(by_epoch.save_after_epoch, 10) == [6, 8, 10]
    for keep, number in ((100, 2), (3, 1)):
        fewer = parsed(*in_folder, "--save_every_n_steps=100", f"--save_last_n_steps={keep}").save
        assert len(models_kept(fewer.save_after_step, 500)) == number
