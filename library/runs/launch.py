"""A run as a process that outlives whoever starts it: its options in a file, its messages in another."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from library.config.atomic_files import CannotWrite, write_text
from library.config.file_names import TIME_FORMAT
from library.training.run_record import RECORD_FOLDER, Start

LAUNCH_FOLDER = "launched"
"""The folder of what was started, in the folder of the records."""
TRAINER = Path(__file__).resolve().parents[2] / "sdxl_train.py"

_SECONDS_BETWEEN_BARS = "2"
_FORMAT = 1


@dataclass(frozen=True)
class Launch:
    """A run that was started: its options as TOML has them, and its process. `name` is that of its files."""

    name: str
    output_name: str | None
    options: Mapping[str, Any]
    start: Start

    def log_file(self, output_dir: Path) -> Path:
        """Return the file that holds what the run has printed."""
        return _folder(output_dir) / f"{self.name}.log"


def launch(output_dir: Path, options: Mapping[str, Any], data_set: str | None = None) -> Launch:
    """Start `sdxl_train.py` with these options, by name and as TOML has them; return what was started.

    `data_set` is the text of a data set file, which takes the place of `dataset_config`. The process has a session of
    its own, so that it goes on when this one ends. Raise `CannotWrite` if its files cannot be written, `UserError` if
    it cannot be started.
    """
    import tomli_w

    output_name = options.get("output_name")
    name = _reserved_name(output_dir, output_name)
    stem = _folder(output_dir) / name
    if data_set is not None:
        data_set_file = stem.with_name(f"{name}.dataset.toml")
        write_text(data_set_file, data_set)
        options = {**options, "dataset_config": str(data_set_file)}
    config = stem.with_name(f"{name}.toml")
    write_text(config, tomli_w.dumps(dict(options)))
    log_file = stem.with_name(f"{name}.log")
    process = _started([sys.executable, str(TRAINER), f"--config_file={config}"], log_file)
    started = datetime.now().isoformat(timespec="seconds")
    start = Start(started, 0, Start.now(0).host, process.pid, _created(process.pid))
    made = Launch(name, output_name, dict(options), start)
    write_text(stem.with_name(f"{name}.json"), json.dumps({"format": _FORMAT, **asdict(made)}, indent=1) + "\n")
    threading.Thread(target=process.wait, name=f"waits for run {process.pid}", daemon=True).start()
    return made


def find_launches(output_dir: Path) -> list[Launch]:
    """Return what was started into an output folder, oldest first; files that say nothing of it are left out."""
    found = []
    for path in sorted(_folder(output_dir).glob("*.json")):
        try:
            found.append(_of_text(path.read_text(encoding="utf-8"), path.stem))
        except (OSError, ValueError):  # written at this moment, or damaged: the log beside it can still be read
            continue
    return found


def _of_text(text: str, name: str) -> Launch:
    content = json.loads(text)
    try:
        if content.pop("format") != _FORMAT or content["name"] != name:
            raise ValueError("it is of another version of this program")
        return Launch(**{**content, "start": Start(**content["start"])})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(str(error)) from error


def _started(command: list[str], log_file: Path) -> "subprocess.Popen[bytes]":
    detached: dict[str, Any] = {"start_new_session": True}
    if os.name == "nt":
        flags = ("CREATE_NEW_PROCESS_GROUP", "DETACHED_PROCESS")
        detached = {"creationflags": sum(getattr(subprocess, flag) for flag in flags)}
    environment = {
        "TQDM_MININTERVAL": _SECONDS_BETWEEN_BARS,  # for the log does not forget any
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    try:
        with log_file.open("wb") as messages:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=subprocess.STDOUT,
                env=environment,
                **detached,
            )
    except OSError as error:
        raise CannotWrite(
            f"cannot start the run: {error.strerror or error}.", "Free some space or memory.", is_temporary=True
        ) from error


def _created(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:  # it has ended already, which its log explains
        return datetime.now().timestamp()


def _reserved_name(output_dir: Path, output_name: str | None) -> str:
    """Return a name that no other start has; its log is made, so that none takes it meanwhile."""
    name = f"{datetime.now():{TIME_FORMAT}}" + ("" if output_name is None else f"_{output_name}")
    folder, number, free = _folder(output_dir), 1, name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                (folder / f"{free}.log").touch(exist_ok=False)
                return free
            except FileExistsError:
                number += 1
                free = f"{name}-{number}"
    except OSError as error:
        raise CannotWrite(
            f"cannot write in '{folder}': {error.strerror or error}.",
            "Free some space, or choose another --output_dir.",
            is_temporary=True,
        ) from error


def _folder(output_dir: Path) -> Path:
    return output_dir / RECORD_FOLDER / LAUNCH_FOLDER
