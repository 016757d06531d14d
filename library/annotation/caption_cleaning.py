"""A cleaning from the captions on the disk to the report: read, cleaned, shown or written with a journal."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from library.annotation.caption_texts import CaptionEntries, CaptionFiles, Captions
from library.annotation.cleaning_rules import Cleaned, Rule, clean_captions
from library.annotation.cleaning_steps import finish_cleaning, write_cleaning
from library.annotation.tag_texts import split_tags
from library.annotation.tally import log_lengths, log_tags, log_too_long
from library.config.errors import listed
from library.config.leftovers import remove_leftovers
from library.sdxl.tokenizers import token_ids

log = logging.getLogger(__name__)

_TAGS_OF_A_SENTENCE = 3
"""Captions that have more parts between separators on average are counted as tags."""


def clean_all(
    source: CaptionFiles | CaptionEntries,
    rules: Sequence[Rule],
    separator: str,
    what: str,
    *,
    dry_run: bool,
    out_json: Path | None = None,
) -> int:
    """Clean the captions of `source`; return 1 if a caption was changed by somebody else meanwhile.

    `what` describes the command: a cleaning of the same one that was killed is finished, and that is all. Raise
    `UserError` where nothing can be done.
    """
    if not dry_run:
        remove_leftovers(*source.folders)
        if (status := finish_cleaning(source.journal, what)) is not None:
            return status
    captions = source.read(with_other=any(rule.kind == "move" for rule in rules))
    cleaned = {
        each.name: clean_captions(each.own, each.other, rules, separator)
        for each in tqdm(captions, "cleaning captions", unit="caption", disable=None, delay=1)
    }
    changed = {each.name: cleaned[each.name] for each in captions if _differs(each, cleaned[each.name])}
    if dry_run:
        _show(captions, changed)
    _report(rules, captions, cleaned, changed, separator)
    verb = "would change" if dry_run else "change"
    log.info("%d of %d captions %s", len(changed), len(captions), verb)
    if dry_run:
        return 0
    if out_json is not None and isinstance(source, CaptionEntries):
        source.write_elsewhere(changed, out_json)
        log.info("wrote '%s'", out_json)
        return 0
    if not changed:
        return 0
    status = write_cleaning(source.journal, what, source.changes(changed))
    log.info("--undo '%s' restores what they were", source.journal)
    return status


def _differs(captions: Captions, cleaned: Cleaned) -> bool:
    return (captions.own, captions.other) != (cleaned.own, cleaned.other)


def _show(captions: Sequence[Captions], changed: Mapping[str, Cleaned]) -> None:
    """Show each caption that changes, line by line, before and after."""
    for each in captions:
        if each.name not in changed:
            continue
        after = changed[each.name]
        lines = [*_diff(each.own, after.own, ""), *_diff(each.other, after.other, "the other encoder: ")]
        log.info("%s", "\n".join([each.name, *lines]))


def _diff(before: Sequence[str], after: Sequence[str], label: str) -> list[str]:
    old, new = ([line.rstrip("\r") for text in texts for line in text.split("\n")] for texts in (before, after))
    old = [*old, *[""] * (len(new) - len(old))]
    pairs = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
    return [line for a, b in pairs for line in ([f"  - {label}{a}"] if a or not label else []) + [f"  + {label}{b}"]]


def _report(
    rules: Sequence[Rule],
    captions: Sequence[Captions],
    cleaned: Mapping[str, Cleaned],
    changed: Mapping[str, Cleaned],
    separator: str,
) -> None:
    """Log what each rule did, the tags or lengths that there are now, and what needs to be looked at."""
    counts = [sum(each.used[place] for each in cleaned.values()) for place in range(len(rules))]
    rows = [f"  {count:>8}  {rule}" for rule, count in zip(rules, counts, strict=True)]
    log.info("%s", "\n".join(["captions that each rule changed:", *rows]))
    texts = {name: "\n".join(each.own).strip() for name, each in cleaned.items()}
    tags = Counter(tag for text in texts.values() for line in text.split("\n") for tag in split_tags(line, separator))
    num_tokens = {name: max(len(token_ids(line)) for line in text.split("\n")) for name, text in texts.items()}
    if sum(tags.values()) > _TAGS_OF_A_SENTENCE * len(texts):
        log_tags(tags)
    else:
        log_lengths(list(num_tokens.values()))
    log_too_long(num_tokens)
    before = {each.name for each in captions if not "".join(each.own).strip()}
    emptied = [f"'{name}'" for name in changed if not texts[name] and name not in before]
    if emptied:
        log.warning("%d captions are empty now: %s", len(emptied), listed(emptied))
