"""Messages: where they go, who speaks, and what a name in them cannot do to the terminal."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from library.config.console_options import ConsoleOptions
from library.config.errors import UserError, exits_on_user_error, listed
from library.config.messages import printable, start_logging

log = logging.getLogger("library.test")
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def console():
    start_logging()
    yield
    start_logging()


def test_information_goes_to_stdout_and_warnings_to_stderr(console, capsys):
    log.info("saved '%s'", "m")
    log.warning("disk full")
    assert capsys.readouterr() == ("saved 'm'\n", "disk full\n")


def test_a_message_begins_on_its_own_line_while_a_progress_bar_is_shown(console, capsys):
    with tqdm(total=2, mininterval=0) as bar:
        bar.update()
        log.warning("disk full")
        bar.update()
    assert re.search(r"\r +\rdisk full\n", capsys.readouterr().err)  # the bar is wiped out, then drawn again below


def test_other_processes_report_errors_only(console, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log.info("saved")
    log.warning("disk full")
    log.error("error: no memory")
    assert capsys.readouterr() == ("", "process 1: error: no memory\n")


def test_other_processes_leave_the_log_file_to_the_main_process(console, capsys, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("RANK", "1")
    start_logging(file=tmp_path / "log.txt")
    log.error("error: no memory")
    assert capsys.readouterr().err == "process 1: error: no memory\n"
    assert not (tmp_path / "log.txt").exists()


SPEAK_WHEN_ASKED = """
import logging, sys
from library.config.messages import start_logging
start_logging()
sys.stdin.readline()
logging.getLogger("library").info("saved")
logging.getLogger("library").warning("still here")
"""


def test_an_output_that_nobody_reads_any_more_ends_no_run():
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", SPEAK_WHEN_ASKED], cwd=REPOSITORY, text=True, **pipes) as process:
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        said = process.stderr.read()
    assert said.startswith("still here\n")


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
    log.error("error: no memory")
    assert capsys.readouterr().err.endswith("ERROR error: no memory\n")  # the console still tells why a run ends
    saved, ended = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert saved.endswith("WARNING disk full")
    assert ended.endswith("ERROR error: no memory")


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
