"""Messages: where they go, who speaks, and what a name in them cannot do to the terminal."""

import logging
import re
from pathlib import Path

import pytest

from library.config.errors import UserError, exits_on_user_error, listed
from library.config.messages import printable, start_logging
from library.training.run_options import ConsoleOptions

log = logging.getLogger("library.test")


@pytest.fixture
def console():
    start_logging()
    yield
    start_logging()


def test_information_goes_to_stdout_and_warnings_to_stderr(console, capsys):
    log.info("saved '%s'", "m")
    log.warning("disk full")
    assert capsys.readouterr() == ("saved 'm'\n", "disk full\n")


def test_other_processes_keep_silent(console, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log.warning("disk full")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\x1b[2Jb.png", r"a\x1b[2Jb.png"),
        ("a\nerror: all is lost", r"a\nerror: all is lost"),
        ("a\rb", r"a\rb"),
        ("a\x1b]0;title\x07", r"a\x1b]0;title\x07"),
        ("a\u202egnp.exe", r"a\u202egnp.exe"),
        ("a\u2028b", r"a\u2028b"),
        ("a\x85b", r"a\x85b"),
        ("Zürich 猫.png", "Zürich 猫.png"),
    ],
    ids=["escape", "line", "return", "title", "right to left", "separator", "next line", "letters"],
)
def test_a_name_cannot_control_the_terminal_or_forge_a_line(name, shown, console, capsys):
    @exits_on_user_error
    def main(argv=None):
        log.info("read '%s'", name)
        raise UserError(f"'{name}' cannot be read.")

    assert main([]) == 2
    assert capsys.readouterr() == (f"read '{shown}'\n", f"error: '{shown}' cannot be read.\n")


def test_half_a_surrogate_pair_is_escaped():
    assert printable("a\ud800b") == r"a\ud800b"


def test_lists_of_our_own_keep_their_lines(console, capsys):
    log.info("2 files:\n  a\n  b")
    assert capsys.readouterr().out == "2 files:\n  a\n  b\n"


def test_a_level_and_a_file_can_be_chosen(console, capsys, tmp_path: Path):
    start_logging("WARNING", tmp_path / "log.txt", simple=False)
    log.info("saved")
    log.warning("disk full")
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").rstrip().endswith("WARNING disk full")


def test_a_long_list_is_cut_and_counted():
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(number) for number in range(12)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"


def test_a_run_writes_its_messages_to_the_file_that_is_named(train, tmp_path: Path, capsys, console):
    file = tmp_path / "train.log"
    run = train(f"--console_log_file={file}", "--console_log_simple=false", "--max_train_steps=1")
    written = file.read_text(encoding="utf-8")
    assert re.search(r"^\d{4}-\d\d-\d\d .* INFO saved '.*m\.safetensors'$", written, re.MULTILINE)
    assert str(run.output) not in capsys.readouterr().out


def test_a_log_file_that_cannot_be_written_is_named_before_training(tmp_path: Path, console):
    with pytest.raises(UserError, match="--console_log_file: cannot write"):
        ConsoleOptions(console_log_file=tmp_path / "no folder" / "train.log").start()
