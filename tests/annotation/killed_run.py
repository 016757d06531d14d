"""A script in a process that is killed when it is about to rename its n-th file into place."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
KILLED_AT_A_RENAME = """
import importlib, os, signal, sys
number, script, *argv = sys.argv[1:]
count = 0
def hook(event, arguments):
    global count
    if event == "os.rename":
        count += 1
        if count == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
sys.exit(importlib.import_module(script).main(argv))
"""


def run_and_kill(script: str, *argv: object, at: int) -> None:
    """Run a script until it renames its `at`-th file; fail if it ends before."""
    command = [sys.executable, "-c", KILLED_AT_A_RENAME, str(at), script, *map(str, argv)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", check=False)
    assert ended.returncode < 0, ended.stderr
