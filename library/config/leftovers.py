"""Temporary names that prove who made them, and what writers that were killed left under such names."""

import hashlib
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from library.config.errors import listed

log = logging.getLogger(__name__)

PARTIAL_SUFFIX = ".partial"
REPLACED_SUFFIX = ".replaced"

_PROGRAM = "sdxl-two-captions"
_LONGEST_NAME = 200  # bytes of a name that leave room for what is added to it
_SECONDS_OF_A_DAY = 86400.0

_OURS = re.compile(r"(?P<name>.+)\.(?P<process>\d+)-(?P<host>\w{8})-(?P<proof>\w{16})(?P<suffix>\.partial|\.replaced)")
_OF_EARLIER_VERSIONS = re.compile(r".+\.\d+(\.partial|\.replaced)")


def temporary_path(path: Path, suffix: str) -> Path:
    """Return the name beside `path` under which this process writes its successor, or puts it aside.

    The name contains a digest of itself, so that no file of anybody else is ever taken for one of ours. The beginning
    of a very long name stands for all of it, except where the name must be found again.
    """
    name = path.name
    if suffix == PARTIAL_SUFFIX and len(name.encode(errors="surrogatepass")) > _LONGEST_NAME:
        name = name[: _LONGEST_NAME // 5]  # a character has up to four bytes
    process = str(os.getpid())
    return path.with_name(f"{name}.{process}-{_host()}-{_proof(name, process, _host(), suffix)}{suffix}")


def remove_leftovers(*folders: Path) -> list[Path]:
    """Remove what writers that were killed left in `folders` (not below them), and report it; return what was removed.

    Call it before this process writes there. Only names of `temporary_path` are touched: those of a process that still
    runs are kept, and for a day those of another machine. A folder that was moved aside, whose complete successor was
    not yet in place, is put back.
    """
    removed: list[Path] = []
    for folder in dict.fromkeys(folders):
        foreign = []
        for path in _candidates(folder):
            if (match := _proven(path.name)) is None:
                foreign += [f"'{path.name}'"] if _OF_EARLIER_VERSIONS.fullmatch(path.name) else []
            elif not _is_in_use(path, match) and _remove(path, match):
                removed.append(path)
        if foreign:
            log.warning(
                "'%s': %s may be leftovers of an earlier version. They stay; remove them if you do not know them.",
                folder,
                listed(foreign),
            )
    if removed:
        log.warning("removed %d unfinished files that a killed run left: %s", len(removed), listed(_names(removed)))
    return removed


def discard_replaced(replaced: Path, successor: Path) -> None:
    """Remove a folder that was moved aside for `successor`, but nothing that the successor does not replace.

    What somebody added to the folder stays, in a folder beside the successor, and is named.
    """
    if replaced.is_symlink():
        replaced.unlink()
        return
    for folder, subfolders, files in os.walk(replaced, topdown=False):
        here = Path(folder)
        for name in (*files, *subfolders):
            path = here / name
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif (successor / path.relative_to(replaced)).exists():
                path.unlink()
    kept = [str(path.relative_to(replaced)) for path in replaced.rglob("*") if path.is_symlink() or not path.is_dir()]
    if not kept:
        shutil.rmtree(replaced)
        return
    former = next(path for path in _numbered(successor) if not path.exists())
    replaced.rename(former)
    log.warning("'%s' replaced a folder that held more; %s are now in '%s'.", successor, listed(kept), former)


def _candidates(folder: Path) -> list[Path]:
    """What ends as temporary names do, in one pass over the names of the folder."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.endswith((PARTIAL_SUFFIX, REPLACED_SUFFIX))]
    except OSError:  # it is not there yet, or not ours to read
        return []
    return [folder / name for name in sorted(names)]


def _proven(name: str) -> re.Match[str] | None:
    """The parts of a name that `temporary_path` made; None for any other."""
    match = _OURS.fullmatch(name)
    if match is None or match["proof"] != _proof(match["name"], match["process"], match["host"], match["suffix"]):
        return None
    return match


def _is_in_use(path: Path, match: re.Match[str]) -> bool:
    """Whether the process that wrote `path` may still run; its number may belong to another one by now."""
    import psutil  # which a script without leftovers need not wait for

    try:
        written = path.stat().st_mtime
        if match["host"] != _host():
            return time.time() - written < _SECONDS_OF_A_DAY
        process = int(match["process"])
        return process != os.getpid() and psutil.Process(process).create_time() <= written
    except (psutil.NoSuchProcess, OverflowError):
        return False
    except (psutil.AccessDenied, OSError):  # somebody else's, or gone by now: nothing more is known
        return True


def _remove(path: Path, match: re.Match[str]) -> bool:
    """Remove a leftover, or put it back; whether it was removed."""
    original = path.with_name(match["name"])
    try:
        if match["suffix"] == REPLACED_SUFFIX and not original.exists():
            path.rename(original)
            return False
        if match["suffix"] == REPLACED_SUFFIX:
            discard_replaced(path, original)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        log.warning("'%s' is left over and cannot be removed: %s", path, error.strerror or error)
        return False
    return True


def _numbered(folder: Path) -> Iterator[Path]:
    number = 1
    while True:
        yield folder.with_name(f"{folder.name} (replaced {number})")
        number += 1


def _names(paths: list[Path]) -> list[str]:
    return [f"'{path}'" for path in paths]


@cache
def _host() -> str:
    return hashlib.blake2b(platform.node().encode(errors="replace"), digest_size=4).hexdigest()


def _proof(*parts: str) -> str:
    text = "\0".join((_PROGRAM, *parts))
    return hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).hexdigest()
