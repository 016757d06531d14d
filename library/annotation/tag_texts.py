"""Texts made of tags: taken apart, put together, and their underscores."""

from collections.abc import Sequence

SEPARATOR = ", "
_LONGEST_FACE = 3
_LONGER_FACES = frozenset({"(o)_(o)", "<o>_<o>", "<|>_<|>", "||_||"})
"""Faces made of signs, whose underscore is a mouth; all of up to three characters are taken for one."""


def split_tags(text: str, separator: str = SEPARATOR) -> list[str]:
    """Return the tags of one line, without the space around them; what is empty between two separators is none."""
    return [tag for part in text.split(separator.strip() or separator) if (tag := part.strip())]


def joined_tags(tags: Sequence[str], separator: str = SEPARATOR) -> str:
    """Return the tags as one line; a separator without space around it gets one behind it."""
    return (f"{separator} " if separator == separator.strip() else separator).join(tags)


def without_underscores(tag: str) -> str:
    """Return a tag with spaces for its underscores, unless it is a face such as ^_^."""
    if len(tag) <= _LONGEST_FACE or tag in _LONGER_FACES:
        return tag
    return tag.replace("_", " ")
