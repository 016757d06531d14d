"""Changes of the files by other programs, noticed within a second."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from watchfiles import awatch

from studio.opened import Opened

log = logging.getLogger(__name__)

_DEBOUNCE_MS, _STEP_MS, _POLL_MS = 300, 50, 500
_SECONDS_UNTIL_BACK = 2.0


async def watch(opened: Opened, stop: asyncio.Event) -> None:
    """Tell the pages of changes until `stop` is set; a folder that is gone is looked for until it is back."""
    folders = opened.captions.folders()
    is_polling = False
    while not stop.is_set():
        present = [folder for folder in folders if folder.is_dir()]
        try:
            await _watch_once(opened, present, stop, is_polling=is_polling, wanted=len(folders))
        except (OSError, RuntimeError) as error:  # no folder by now, or a disk that reports nothing
            if not is_polling and present == [folder for folder in folders if folder.is_dir()]:
                log.info("changes of files are looked for every half second: %s", error)
                is_polling = True
        except ExceptionGroup as errors:  # while it watches, such as a change of a file whose name is no UTF-8
            if errors.split((OSError, RuntimeError))[1] is not None:
                raise
            log.info("changes were missed, and all captions are read again: %s", errors.exceptions[0])
            await run_in_threadpool(opened.captions.load)
        if not stop.is_set():
            await _pause(stop)
            await run_in_threadpool(opened.captions.list_images)
            opened.hub.publish("listed")


async def _watch_once(
    opened: Opened, folders: Sequence[Path], stop: asyncio.Event, *, is_polling: bool, wanted: int
) -> None:
    """Watch until a folder appears or is gone."""
    if not folders:
        return
    async for changes in awatch(
        *folders,
        watch_filter=None,
        debounce=_DEBOUNCE_MS,
        step=_STEP_MS,
        stop_event=stop,
        rust_timeout=1000,
        yield_on_timeout=True,
        force_polling=is_polling,
        poll_delay_ms=_POLL_MS,
        recursive=False,
    ):
        paths = {Path(path) for _, path in changes}
        if paths:
            changed = await run_in_threadpool(opened.captions.refresh, _as_known(paths, folders))
            if changed:
                opened.tell_of_changes(changed)
        present = sum(folder.is_dir() for folder in opened.captions.folders())
        if present != len(folders) or (present < wanted and len(folders) < present):
            return


def _as_known(paths: set[Path], folders: Sequence[Path]) -> list[Path]:
    """Return paths in the spelling of the folders that were opened: the watcher makes them absolute."""
    known = {folder.absolute(): folder for folder in folders} | {folder.resolve(): folder for folder in folders}
    return [known[path.parent] / path.name if path.parent in known else path for path in paths]


async def _pause(stop: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(stop.wait(), _SECONDS_UNTIL_BACK)
    except TimeoutError:
        return
