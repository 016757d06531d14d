"""docs/reliability-tests.md is true: each row of its tables names a test, and the test exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability-tests.md"
TEST = re.compile(r"`(?P<path>tests/[\w/]+\.py)::(?P<function>\w+)(?:\[(?P<id>.+)\])?`")


def rows() -> list[tuple[str, ...]]:
    """Bad input, what happens, and test of each row, headings left out."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]) for line in lines]
    return [row for row in cells if row[0] != "Bad input" and set(row[0]) != {"-"}]


@cache
def functions_of(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_the_table_has_sixty_rows_and_none_twice():
    inputs = [(bad_input, test) for bad_input, _, test in rows()]
    assert len(inputs) >= 60
    assert len(set(inputs)) == len(inputs)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_each_row_says_what_happens_and_names_a_test_that_exists(row: tuple[str, ...]):
    _, happens, test = row
    assert happens.endswith(".")
    named = TEST.fullmatch(test)
    assert named is not None, test
    assert named["function"].startswith("test_")
    assert named["function"] in functions_of(named["path"])
    if named["id"] is not None:
        assert f'"{named["id"]}"' in (ROOT / named["path"]).read_text(encoding="utf-8")
