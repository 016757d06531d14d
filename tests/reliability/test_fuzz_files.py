"""A short form of benchmarks/fuzz_files.py: damaged files of each kind, read by the scripts and by their functions."""

import random
import time
from pathlib import Path

import pytest

from benchmarks.damaged_bytes import damages_of
from benchmarks.fuzz_files import Fuzz, fault_of
from benchmarks.fuzz_kinds import KINDS, make_whole_files
from benchmarks.fuzz_readers import READERS, Reader, read_damaged
from tests.conftest import forget_accelerator
from tests.forked_runs import RunServer

pytestmark = pytest.mark.slow  # whole runs

NUM_RUNS = 3
NUM_READINGS = 25


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of each kind."""
    forget_accelerator()
    folder = tmp_path_factory.mktemp("fuzz") / "whole"
    make_whole_files(folder)
    forget_accelerator()
    return folder


@pytest.mark.slow  # runs of whole scripts
@pytest.mark.heavy
@pytest.mark.trains
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_used_or_refused(whole: Path, tmp_path: Path, _server: RunServer):
    fuzz = Fuzz(_server, whole, tmp_path / "work", seed=1, tries_whole_files=False)
    readings = [fuzz.reading(number) for number in range(NUM_READINGS)]
    faults = [f"{each.reader}: {each.damage}: {each.fault}" for each in readings if each.fault]
    endings = fuzz.endings(2, until=lambda begun: begun == NUM_RUNS, meanwhile=lambda: time.sleep(0.01))
    faults += [f"{each.kind}: {each.damage}: {each.fault}" for each in endings if each.fault]
    assert faults == []


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.trains
def test_each_kind_has_files_and_damages(whole: Path):
    for each in (*KINDS, *READERS):
        files = {path.suffix: path for path in whole.glob(each.pattern) if path.is_file()}
        assert files, each.name
        for path in files.values():
            chance = random.Random(0)
            data = path.read_bytes()
            assert all(any(damage(data, chance) != data for _ in range(5)) for damage in damages_of(path.suffix)), (
                path.name
            )


@pytest.mark.parametrize(
    ("script", "status", "said", "fault"),
    [
        ("train", 0, "saved\n", ""),
        ("train", 2, "notice\nerror: there is no file\n  a list\n", ""),
        ("prepare", 1, "1 image is left out\n", ""),
        ("train", 1, "", "status 1: "),
        ("train", -11, "", "status -11: "),
        (
            "prepare",
            1,
            "error: something happened that this program does not expect",
            "status 1: error: something happened that this program does not expect",
        ),
        ("train", 2, "", "0 lines that begin with error:"),
        ("train", 2, "error: a\nerror: b\n", "2 lines that begin with error:"),
        ("train", 2, "Traceback (most recent call last):\nKeyError: 5\nerror: a", "a traceback: error: a"),
    ],
)
def test_how_a_run_ended_is_judged(script: str, status: int, said: str, fault: str):
    assert fault_of(script, status, said) == fault


def test_a_reader_that_breaks_is_found(tmp_path: Path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "a.bin").write_bytes(b"abc")
    breaking = Reader("one that breaks", "*.bin", lambda path: 1 // 0)
    found = read_damaged(breaking, tmp_path / "whole", tmp_path / "work", random.Random(0))
    assert found.fault.startswith("ZeroDivisionError")
    assert (tmp_path / "work" / "a.bin").exists()
