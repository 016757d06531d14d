"""The rules of sd-scripts for booru tags, as a table: what says too much, or the same twice."""

import re
from collections.abc import Sequence

from library.annotation.tag_texts import without_underscores

_SEVERAL_PERSONS = re.compile("girls|boys")
_RATING = re.compile("rating")
_HAIR_LENGTH = re.compile(r"(long|short|medium) hair")

OF_ONE_PERSON = {
    "hair length": _HAIR_LENGTH,
    "hair cut": re.compile(r"(bob|hime) cut"),
    "eyes": re.compile(r"[\w\-]+ eyes"),
    "sleeves": re.compile(r"[\w\-]+ sleeves|sleeveless"),
    "hair style": re.compile(
        r"ponytail|braid|ahoge|twintails|[\w\-]+ bun|single hair bun|single side bun|two side up|two tails"
        r"|[\w\-]+ braid|sidelocks"
    ),
    "hair": re.compile(r"(?!(?:long|short|medium) hair)[\w\-]+ hair"),
}
"""What persons differ in: with several persons, two tags of one kind do not tell whose they are."""
CONTAINED = re.compile(r"[\w\-]+|hair ornament")
"""Tags that are left out where a longer tag ends with them: "shirt" beside "white shirt"."""


def cleaned_booru_tags(tags: Sequence[str]) -> list[str]:
    """Return the tags after all rules.

    Underscores become spaces but in ^_^ and its like; what stands from a rating on is left out; where several persons
    are shown, so are tags of one kind if there are two or more; and tags that are the end of a longer one.
    """
    kept = [without_underscores(tag) for tag in tags]
    end = next((place for place, tag in enumerate(kept) if place and _RATING.match(tag)), len(kept))
    kept = kept[:end]
    if any(_SEVERAL_PERSONS.search(tag) for tag in kept):
        for pattern in OF_ONE_PERSON.values():
            of_kind = {tag for tag in kept if pattern.fullmatch(tag)}
            if sum(tag in of_kind for tag in kept) > 1:
                kept = [tag for tag in kept if tag not in of_kind]
    ends = {" ".join(words[start:]) for tag in kept for words in [tag.split()] for start in range(1, len(words))}
    return [tag for tag in kept if not (tag in ends and CONTAINED.fullmatch(tag))]
