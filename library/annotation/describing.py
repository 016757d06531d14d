"""The walk of a captioner through its images: the model describes a batch while the last one is being written."""

import logging
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from library.annotation.pending_images import Pending, caption_file
from library.annotation.reading_ahead import Described, Machine, batches_ahead, num_reading_threads
from library.annotation.tag_texts import split_tags
from library.annotation.tally import Tally
from library.config.atomic_files import write_text
from library.config.errors import UserError
from library.config.processes import Share
from library.data.strict_json import read_utf8
from library.sdxl.tokenizers import token_ids

if TYPE_CHECKING:
    from library.annotation.image_options import ImageOptions

log = logging.getLogger(__name__)

_WRITES_WAITING = 64
"""Files that may wait to be written: a slow disk holds the model up, and memory does not grow."""


@dataclass(frozen=True)
class CaptionWriter:
    """Writes captions beside images, each file whole or not at all.

    Without `keeps_existing` a file is replaced, but for `appended_by`: a separator, with which tags that a file does
    not hold yet are added to it.
    """

    folder: Path
    extension: str
    keeps_existing: bool
    appended_by: str | None = None

    def write(self, image: Path, described: Described, tally: Tally) -> None:
        """Write what was said of `image` and note it. Raise `UserError` for a full disk and the like."""
        file = caption_file(image, self.extension)
        text, name = described.text, self.name(image)
        if self.appended_by is not None and file.exists():
            text = with_more_tags(file, described.tags, self.appended_by)
        elif self.keeps_existing and file.exists():
            return  # somebody wrote it meanwhile
        write_text(file, f"{text}\n")
        tally.num_written += 1
        tally.tags.update(described.tags)
        if described.is_cut:
            tally.cut.append(name)
        tally.num_tokens[name] = len(token_ids(text))

    def name(self, image: Path) -> str:
        """Return what the report calls an image: its path in the folder."""
        return image.relative_to(self.folder).as_posix()


def with_more_tags(file: Path, tags: tuple[str, ...], separator: str) -> str:
    """Return the tags of a caption file, followed by those of `tags` that it does not hold."""
    before = split_tags(" ".join(read_utf8(file).split("\n")), separator.strip())
    return separator.join([*before, *(tag for tag in tags if tag not in before)])


def write_captions(
    pending: Pending, machine: Machine, writer: CaptionWriter, options: "ImageOptions", batch_size: int, share: Share
) -> Tally:
    """Caption the images of this process; return what became of them.

    Whatever ends it, every file is whole, and what is written stays. Raise `UserError` where nothing more can be done.
    """
    tally = Tally()
    what = "images" if share.count == 1 else f"images of process {share.index + 1} of {share.count}"
    is_silent = options.debug or not share.is_first
    with (
        ThreadPoolExecutor(1, thread_name_prefix="writing") as pool,
        tqdm(total=len(pending.images), desc=what, unit="image", disable=is_silent) as bar,
    ):
        started = time.perf_counter()
        waiting: deque[Future[None]] = deque()
        for image, described in _described(pending, machine, tally, options, batch_size):
            bar.update()
            if isinstance(described, UserError):
                tally.problems.append(str(described))
            elif described.is_refusal:
                tally.refused.append(writer.name(image))
            elif not described.text:
                tally.empty.append(writer.name(image))
            else:
                waiting.append(pool.submit(writer.write, image, described, tally))
            if options.debug and isinstance(described, Described):
                log.info("%s: %s", writer.name(image), described.details or described.text)
            while len(waiting) > _WRITES_WAITING or (waiting and waiting[0].done()):
                waiting.popleft().result()
        for future in waiting:
            future.result()
        tally.seconds = time.perf_counter() - started
    return tally


def _described(
    pending: Pending, machine: Machine, tally: Tally, options: "ImageOptions", batch_size: int
) -> Iterator[tuple[Path, Described | UserError]]:
    num_threads = num_reading_threads(options.max_data_loader_n_workers)
    for batch in batches_ahead(pending.images, machine, batch_size, num_threads):
        yield from batch.failed
        if not batch.images:
            continue
        started = time.perf_counter()
        described = machine.describe(batch.prepared)
        tally.seconds_of_model += time.perf_counter() - started
        yield from zip(batch.images, described, strict=True)
