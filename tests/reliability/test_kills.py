"""Processes killed at random moments and started again come to the same as one that nobody disturbed.

benchmarks/kill_runs.py does it longer: its figures are in benchmarks/results.
"""

import random
from pathlib import Path

import pytest

from benchmarks.kill_experiment import KillExperiment

pytestmark = pytest.mark.slow  # minutes; tests/reliability/test_captions_in_training.py kills a run once


def test_a_round_of_kills_changes_nothing(_server, tmp_path: Path):
    experiment = KillExperiment(_server, tmp_path, num_steps=2)
    assert len(experiment.expected) > 20
    chance, kills, number = random.Random(3), [], 0
    while not kills:  # a kill may be aimed at a moment that never comes
        number += 1
        kills, different = experiment.killed_round(f"killed {number}", chance)
        assert different == []
