"""Adafactor's programs for a GPU: in Triton's interpreter against the step weight by weight, and compiled ahead."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from library.optim import triton_launches, triton_trial

ROOT = Path(__file__).parents[2]
triton = pytest.importorskip("triton")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from library.optim import chunk_programs as programs

POINTERS = {"parameters": "*i64", "tiles": "*i64", "blocks": "*i64", "numbers": "*fp32", "is_finite": "*i32",
            "scratch": "*fp32"}
POINTERS |= {"table": "*i64", "parts": "*i64"}
CONSTANTS = {"NARROW": True, "ROUNDING": programs.AT_RANDOM.value, "DOWN": programs.TILE_DOWN,
             "ACROSS": programs.TILE_ACROSS, "BLOCK": programs.BLOCK}
for program in (programs.sums, programs.means, programs.norms, programs.apply, programs.round_all):
    signature = {name: POINTERS.get(name, "constexpr") for name in program.arg_names}
    constants = {name: value for name, value in CONSTANTS.items() if name in program.arg_names}
    for capability in CAPABILITIES:
        source = triton.compiler.ASTSource(fn=program, signature=signature, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=programs.LAUNCH)
        assert len(made.asm["cubin"]) > 0
        assert "fma.rn.f32" not in made.asm["ptx"], "multiplications and additions round one by one"
        print(program.__name__, capability, len(made.asm["cubin"]), "bytes")
"""


def run(*command: str, **environment: str) -> str:
    ended = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_programs_step_as_weight_by_weight_and_change_nothing_for_a_loss_that_is_not_finite():
    script = str(Path(__file__).with_name("chunk_steps_in_interpreter.py"))
    said = run(script, "stochastic", TRITON_INTERPRET="1")
    assert said.count("the same") == 4
    assert said.count("as in float64") == 1
    assert "the trial notices what is wrong" in said


@pytest.mark.parametrize("reason", ["it is not installed", "RuntimeError: Failed to find C compiler.", None])
def test_what_runs_instead_of_triton_is_told_once(reason, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="library.optim.triton_launches")
    monkeypatch.setattr(triton_trial, "why_not", lambda device: reason)
    triton_launches.has_triton.cache_clear()
    found = [triton_launches.has_triton() for _ in range(2)]
    triton_launches.has_triton.cache_clear()
    assert found == [reason is None] * 2
    [message] = caplog.messages
    if reason is None:
        assert "by programs of Triton" in message
    else:
        assert message.startswith(
            f"Triton cannot be used ({reason}): the optimizer's weights are updated and rounded by"
        )


@pytest.mark.slow
def test_the_programs_step_as_weight_by_weight_with_every_rounding():
    script = str(Path(__file__).with_name("chunk_steps_in_interpreter.py"))
    said = run(script, TRITON_INTERPRET="1")
    assert said.count("the same") == 12
    assert said.count("as in float64") == 5


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_the_programs_compile_ahead_for_the_gpus_in_use(capability: int):
    said = run("-c", COMPILE.replace("CAPABILITIES", f"({capability},)"))
    assert said.count("bytes") == 5
