"""Clean the captions of one encoder, in files beside images or in metadata, as one step that can be undone."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

from library.annotation.cleaning_options import CleaningOptions, RuleOptions, UndoOptions
from library.config.errors import exits_on_user_error
from library.config.options import parse_options
from library.config.processes import share_of_process
from library.training.run_lock import run_lock

DESCRIPTION = "Clean the captions of one encoder: find and replace, remove, move, sort. Every change can be undone."
UNDO_DESCRIPTION = "Restore every byte that a cleaning changed."
OPTION_CLASSES: list[type] = [CleaningOptions, RuleOptions]
UNDO_CLASSES: list[type] = [UndoOptions]


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Clean or restore captions; return 1 if some files were changed by somebody else meanwhile."""
    argv = sys.argv[1:] if argv is None else argv
    if any(argument.partition("=")[0] == "--undo" for argument in argv):
        (undoing,) = parse_options(UNDO_CLASSES, argv, description=UNDO_DESCRIPTION)
        from library.annotation.cleaning_steps import undo_cleaning

        with run_lock(undoing.undo.parent, "captions", doing="changing"):
            return undo_cleaning(undoing.undo)
    options, rule_options = parse_options(OPTION_CLASSES, argv, description=DESCRIPTION)
    if not share_of_process().is_first:  # started on several GPUs: one process does it
        return 0
    return clean(options, rule_options, what=_described(options, rule_options))


def _described(*chosen: Any) -> str:
    """Return the flags of a command that are set, on one line: the name of its step."""
    values = [(field.name, getattr(each, field.name), field) for each in chosen for field in dataclasses.fields(each)]
    return "clean " + " ".join(f"{name}={value!r}" for name, value, field in values if not _is_default(field, value))


def _is_default(field: dataclasses.Field, value: Any) -> bool:
    return value == (field.default if field.default_factory is dataclasses.MISSING else field.default_factory())


def clean(options: CleaningOptions, rule_options: RuleOptions, what: str) -> int:
    """Clean the captions that the options name."""
    from library.annotation.caption_cleaning import clean_all
    from library.annotation.caption_texts import CaptionEntries, CaptionFiles, column_of, other_column

    column, separator, place = column_of(options.encoder or ""), options.caption_separator, options.captions
    rules = rule_options.in_order(separator)
    with run_lock(place if place.is_dir() else place.parent, "captions", doing="changing"):
        if place.is_dir():
            extension = options.caption_extension or column.caption_extension
            other_extension = options.other_caption_extension or other_column(column).caption_extension
            files = CaptionFiles(place, extension, other_extension, recursive=options.recursive)
            return clean_all(files, rules, separator, what, dry_run=options.dry_run)
        entries = CaptionEntries(place, column, separator)
        return clean_all(entries, rules, separator, what, dry_run=options.dry_run, out_json=options.out_json)


if __name__ == "__main__":
    sys.exit(main())
