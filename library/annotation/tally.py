"""What a run of a captioner has done, over all processes, and the report of it."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from library.config.errors import listed

log = logging.getLogger(__name__)

TOKENS_OF_A_CAPTION = 75
"""What an encoder reads unless --max_token_length says otherwise."""
_LENGTHS = (25, 50, 75, 150, 225)
_MOST_TAGS = 20


@dataclass
class Tally:
    """Counts and names; images are named by their paths in the folder."""

    num_written: int = 0
    num_existing: int = 0
    problems: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    tags: Counter[str] = field(default_factory=Counter)
    num_tokens: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_of_model: float = 0.0

    @property
    def num_without(self) -> int:
        """How many images have no caption for a reason that is named."""
        return len(self.problems) + len(self.empty) + len(self.refused)


def merged(tallies: Iterable[Tally]) -> Tally:
    """Return the tally of all processes; they worked at the same time.

    One that began later may have found files of the others: the first to look knows how many there were before.
    """
    tallies = list(tallies)
    whole = Tally(num_existing=min(each.num_existing for each in tallies))
    for each in tallies:
        whole.num_written += each.num_written
        for name in ("problems", "empty", "refused", "cut"):
            getattr(whole, name).extend(getattr(each, name))
        whole.tags += each.tags
        whole.num_tokens |= each.num_tokens
        whole.seconds = max(whole.seconds, each.seconds)
        whole.seconds_of_model = max(whole.seconds_of_model, each.seconds_of_model)
    return whole


def report(tally: Tally, folder: Path, extension: str, *, all_tags: bool = False) -> None:
    """Log what was written, the most frequent tags or the lengths, and every image that needs to be looked at."""
    there = f"; {tally.num_existing} were there already" if tally.num_existing else ""
    speed = ""
    if tally.num_written and tally.seconds > 0:
        busy = f"the model worked {tally.seconds_of_model / tally.seconds * 100:.0f} % of the time"
        speed = f": {tally.num_written / tally.seconds:.1f} images a second, {busy}"
    log.info("wrote %d %s files to '%s'%s%s", tally.num_written, extension, folder, speed, there)
    if tally.tags:
        log_tags(tally.tags, None if all_tags else _MOST_TAGS)
    elif tally.num_tokens:
        log_lengths(list(tally.num_tokens.values()))
    log_too_long(tally.num_tokens)
    _warn("images could not be used", tally.problems)
    _warn("images have no caption because the model said nothing", tally.empty)
    _warn("images have no caption because the model refused", tally.refused)
    _warn("captions end where --max_new_tokens cut them", tally.cut)


def log_tags(tags: Counter[str], most: int | None = _MOST_TAGS) -> None:
    """Log the most frequent tags with their number of images; all of them if `most` is None."""
    rows = sorted(tags.items(), key=lambda row: (-row[1], row[0]))[:most]
    what = f"the {len(rows)} most frequent of {len(tags)} tags" if len(rows) < len(tags) else f"{len(tags)} tags"
    log.info("%s", "\n".join([f"{what}:", "  images  tag", *(f"  {count:>6}  {tag}" for tag, count in rows)]))


def log_lengths(lengths: Sequence[int]) -> None:
    """Log how many captions have how many tokens."""
    rows, least = [], 1
    for most in _LENGTHS:
        rows.append((f"{least}-{most}", sum(least <= length <= most for length in lengths)))
        least = most + 1
    rows.append((f"{least} or more", sum(length >= least for length in lengths)))
    shown = [f"  {count:>8}  {name}" for name, count in rows if count]
    log.info("%s", "\n".join(["lengths:", "  captions  tokens", *shown]))


def log_too_long(num_tokens: dict[str, int]) -> None:
    """Name the captions of which training cuts the end."""
    too_long = {name: count for name, count in num_tokens.items() if count > TOKENS_OF_A_CAPTION}
    if not too_long:
        return
    longest_first = sorted(too_long, key=lambda name: (-too_long[name], name))
    names = listed([f"{name} ({too_long[name]})" for name in longest_first])
    remedy = "--max_token_length=150 or 225 of sdxl_train.py reads more; else they are cut there."
    log.warning("%d captions are longer than %d tokens: %s. %s", len(too_long), TOKENS_OF_A_CAPTION, names, remedy)


def _warn(what: str, names: Sequence[str]) -> None:
    if names:
        log.warning("%d %s: %s", len(names), what, listed(sorted(names)))
