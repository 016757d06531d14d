"""What every script does with a mistake of the user: status 2, one message, no traceback, nothing written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import pytest

from library.config.errors import EXIT_USER_ERROR, Main
from tests.conftest import forget_accelerator


class Script(Protocol):
    """A script of this project, imported."""

    main: Main


def said_on_refusal(script: Script, argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which `script` refuses `argv`; it has made no folder `output` and left no unfinished file."""
    forget_accelerator()
    capsys.readouterr()
    assert script.main(argv) == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert "error: " in said
    assert "Traceback" not in said
    assert not Path("output").exists() or not list(Path("output").iterdir())
    assert not list(Path().rglob("*.partial"))
    return said
