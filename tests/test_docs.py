"""Documents that are made from the code agree with it."""

import importlib.util
from pathlib import Path

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
