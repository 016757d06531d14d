"""The states of many files at once are those of each."""

import os

import numpy as np

from library.data.caption_sources import CaptionFile, CaptionSource
from library.data.caption_states import StatesBuilder
from library.data.columns import Texts
from library.data.file_states import ABSENT, STATE, state_of, states_of_files
from library.data.metadata import COLUMN_L

WHOLE_SECOND, BETWEEN = 1_700_000_000_000_000_000, 1_700_000_000_000_000_007


def test_states_of_many_files_are_those_of_each(tmp_path):
    paths = [str(tmp_path / name) for name in ("whole", "between", "with space \u00e9", "gone")]
    for path, time in zip(paths, (WHOLE_SECOND, BETWEEN, BETWEEN), strict=False):
        with open(path, "w") as file:  # noqa: PTH123
            file.write(path)
        os.utime(path, ns=(time, time))
    paths += ["", str(tmp_path), "null\0byte", os.fsdecode(os.fsencode(tmp_path) + b"/\xff")]
    states = states_of_files(Texts.of(paths))
    assert states.dtype == STATE
    assert states.tolist() == [state_of(path) for path in paths]
    assert states["inode"][0] and not states["inode"][1]
    assert states[[3, 4, 6, 7]].tolist() == [ABSENT] * 4


def test_caption_files_are_judged_together_as_one_by_one(tmp_path):
    now = state_of(_written(tmp_path / "a.txt"))
    cases = {
        "as recorded": ((now[0], now[1]), 0, False),
        "another time": ((now[0], now[1] - 1), 0, True),
        "another size": ((now[0] + 1, now[1]), 0, True),
        "older than the metadata": (None, now[1], False),
        "younger": (None, now[1] - 1, True),
    }
    for name, (recorded, since, expected) in cases.items():
        source = None if recorded is None else CaptionSource(".txt", *recorded, "")
        file = CaptionFile("a", COLUMN_L, str(tmp_path / "a.txt"), ".txt", now[0], now[1], source)
        builder = StatesBuilder()
        builder.add(file)
        assert builder.built().may_have_changed(since) == file.may_have_changed(since) == expected, name
    (tmp_path / "a.txt").unlink()
    assert all(_one(tmp_path / "a.txt", recorded).may_have_changed(2**62) for recorded in (None, (now[0], now[1])))


def test_no_caption_file_has_not_changed():
    assert not StatesBuilder().built().may_have_changed(0)


def _one(path, recorded):
    builder = StatesBuilder()
    source = None if recorded is None else CaptionSource(".txt", *recorded, "")
    builder.add(CaptionFile("a", COLUMN_L, str(path), ".txt", 0, 0, source))
    return builder.built()


def _written(path):
    path.write_text("a caption")
    return path


def test_texts_lose_a_start_that_they_have():
    texts = Texts.of(["ab/c", "ab", "ab/", "", "\u00e9/ab/", "ab/ab/"])
    assert list(texts.without_start("ab/")) == ["c", "ab", "", "", "\u00e9/ab/", "ab/"]
    assert list(texts.take(np.array([5, 0])).without_start("ab/")) == ["ab/", "c"]
    assert list(Texts.of([]).without_start("a")) == []
