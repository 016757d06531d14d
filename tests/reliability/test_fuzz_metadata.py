"""A short form of benchmarks/fuzz_metadata.py: damaged metadata is read, or refused in one line, by every script."""

import random
from pathlib import Path

import pytest

from benchmarks.fuzz_metadata import damaged, fuzz


@pytest.mark.heavy
@pytest.mark.trains
@pytest.mark.slow  # all four scripts for each file
def test_damaged_metadata_ends_with_success_or_one_line_of_error(tmp_path: Path):
    result = fuzz(tmp_path / "set", seed=3, num_cases=6)
    assert result["num_files"] == 6
    assert result["findings"] == []
    assert sum(result["outcomes"].values()) == 4 * 6


def test_the_damage_is_the_same_for_a_seed_and_differs_from_file_to_file():
    first, second = random.Random(1), random.Random(1)
    files = [damaged(first) for _ in range(200)]
    assert files == [damaged(second) for _ in range(200)]
    assert len(set(files)) > 100
    assert {name for name, _ in files} == {"meta.json", "meta.jsonl"}
