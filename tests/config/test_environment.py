"""What torch reads from the environment."""

import sys

import pytest

from library.config.environment import torch_environment


def test_threads_sleep_between_loops_and_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert torch_environment()["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert "OMP_WAIT_POLICY" not in torch_environment()


@pytest.mark.parametrize(("platform", "grow"), [("linux", True), ("win32", False)])
def test_segments_grow_where_they_can(platform: str, grow: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    assert ("expandable_segments:True" in torch_environment().values()) is grow
