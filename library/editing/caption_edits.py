"""One edit of both captions of an image, the same for many: tags added, removed, moved or replaced, text replaced."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from library.captions.draws import Encoder
from library.config.errors import UserError
from library.editing.caption_text import CaptionText

REPLACE, ADD, REMOVE, MOVE = "replace", "add", "remove", "move"
KINDS = (REPLACE, ADD, REMOVE, MOVE)
TAG, TEXT, PATTERN = "tag", "text", "pattern"
READINGS = (TAG, TEXT, PATTERN)


@dataclass(frozen=True)
class Edit:
    """What to do with the captions of `encoders`.

    `replace` puts `by` where `find` is: a whole tag, any text, or a regular expression, as `reading` says. `add` and
    `remove` are about the tags `find`, separated as tags are; they are added in front or behind. `move` removes the
    tags of the first encoder, where they are, and adds them to the second.
    """

    kind: str
    encoders: tuple[Encoder, ...]
    find: str
    by: str = ""
    reading: str = TAG
    matches_case: bool = False
    in_front: bool = False

    def problem(self) -> str | None:
        """Return what is wrong with it, in a sentence."""
        if self.kind not in KINDS or self.reading not in READINGS:
            return "this edit is not known."
        if not self.find.strip():
            return "nothing to look for. Write a tag or a text."
        if not self.encoders or (self.kind == MOVE and len(set(self.encoders)) != 2):
            return "no caption is chosen. Choose L, G or both; to move tags, from one to the other."
        if self.reading == PATTERN and (reason := pattern_problem(self.find, self.by)):
            return f"'{self.find}' is no regular expression, or '{self.by}' no replacement: {reason}."
        return None

    @property
    def what(self) -> str:
        """Name the edit, for the list of what can be undone."""
        letters = " and ".join(encoder.upper() for encoder in self.encoders)
        words = {
            REPLACE: f"replace '{self.find}' by '{self.by}' in {letters}",
            ADD: f"add '{self.find}' to {letters}",
            REMOVE: f"remove '{self.find}' from {letters}",
            MOVE: f"move '{self.find}' from {letters.replace(' and ', ' to ')}",
        }
        return words[self.kind]


@dataclass(frozen=True)
class EditedPair:
    """Both captions of an image, None where there is none, and how their tags are separated."""

    captions: dict[Encoder, CaptionText | None]
    separators: dict[Encoder, str]


def edited(edit: Edit, pair: EditedPair) -> dict[Encoder, CaptionText | None]:
    """Return both captions after an edit, the same objects where nothing changes. Raise `UserError` for a wrong one."""
    problem = edit.problem()
    if problem is not None:
        raise UserError(problem)
    if edit.kind == MOVE:
        return _moved(edit, pair)
    captions = dict(pair.captions)
    for encoder in edit.encoders:
        separator = pair.separators[encoder]
        caption = captions[encoder]
        if edit.kind == ADD:
            captions[encoder] = _of_each_variant(
                caption or CaptionText.parse(None),
                lambda text, own=separator: added(text, tags_of(edit.find, own), own, in_front=edit.in_front),  # type: ignore[misc]
            )
        elif caption is not None:
            captions[encoder] = _of_each_variant(caption, _changing(edit, separator))
    return captions


def pattern_problem(pattern: str, by: str) -> str | None:
    """Return why a regular expression cannot be replaced by `by`, as Python's module re says it; None if it can."""
    try:
        re.compile(pattern).sub(by, "")
    except (re.error, IndexError) as error:
        return str(error)
    return None


def tags_of(text: str, separator: str) -> list[str]:
    """Return the tags of a text, in order, each once."""
    return list(dict.fromkeys(tag for piece in text.split(separator) if (tag := piece.strip())))


def added(text: str, tags: Sequence[str], separator: str, *, in_front: bool = False) -> str:
    """Return a text with the tags that it does not have yet; what is there keeps its spelling."""
    present = {tag.casefold() for tag in tags_of(text, separator)}
    new = [tag for tag in tags if tag.casefold() not in present]
    if not new:
        return text
    rest = text.strip().strip(separator).strip()
    parts = [*new, rest] if in_front else [rest, *new]
    return f"{separator} ".join(part for part in parts if part)


def removed(text: str, tags: Sequence[str], separator: str, *, matches_case: bool = False) -> str:
    """Return a text without some tags; what stays keeps its spelling and blanks."""
    fold: Callable[[str], str] = str if matches_case else str.casefold
    unwanted = {fold(tag) for tag in tags}
    pieces = text.split(separator)
    kept = [piece for piece in pieces if fold(piece.strip()) not in unwanted]
    if len(kept) == len(pieces):
        return text
    text = separator.join(kept)
    return text if kept and kept[0] is pieces[0] else text.lstrip()


def _changing(edit: Edit, separator: str) -> Callable[[str], str]:
    if edit.kind == REMOVE:
        return lambda text: removed(text, tags_of(edit.find, separator), separator, matches_case=edit.matches_case)
    if edit.reading == TAG:
        return lambda text: _with_tag_replaced(text, edit, separator)
    pattern = edit.find if edit.reading == PATTERN else re.escape(edit.find)
    compiled = re.compile(pattern, 0 if edit.matches_case else re.IGNORECASE)
    by = edit.by if edit.reading == PATTERN else edit.by.replace("\\", r"\\")
    return lambda text: compiled.sub(by, text)


def _with_tag_replaced(text: str, edit: Edit, separator: str) -> str:
    fold: Callable[[str], str] = str if edit.matches_case else str.casefold
    old, new = fold(edit.find.strip()), edit.by.strip()
    pieces = text.split(separator)
    if not any(fold(piece.strip()) == old for piece in pieces):
        return text
    if not new:
        return removed(text, [edit.find.strip()], separator, matches_case=edit.matches_case)
    replaced, is_there = [], False
    for piece in pieces:
        tag = piece.strip()
        is_new = fold(tag) == old or tag == new
        if not (is_new and is_there):  # two tags that have become one stand once
            replaced.append(piece.replace(tag, new) if is_new else piece)
        is_there = is_there or is_new
    return separator.join(replaced)


def _moved(edit: Edit, pair: EditedPair) -> dict[Encoder, CaptionText | None]:
    source, target = edit.encoders
    caption = pair.captions[source]
    wanted = {tag.casefold() for tag in tags_of(edit.find, pair.separators[source])}
    there = (
        [] if caption is None else [tag for text in caption.variants for tag in tags_of(text, pair.separators[source])]
    )
    moving = list(dict.fromkeys(tag for tag in there if tag.casefold() in wanted))
    if caption is None or not moving:
        return dict(pair.captions)
    return {
        source: _of_each_variant(caption, lambda text: removed(text, moving, pair.separators[source])),
        target: _of_each_variant(
            pair.captions[target] or CaptionText.parse(None),
            lambda text: added(text, moving, pair.separators[target], in_front=edit.in_front),
        ),
    }


def _of_each_variant(caption: CaptionText, change: Callable[[str], str]) -> CaptionText:
    changed = caption
    for number in reversed(range(len(caption.places))):  # from behind: a variant that becomes empty is one no more
        text = caption.lines[caption.places[number]].text
        new = change(text)
        if new != text:
            changed = changed.with_variant(number, new)
    return changed
