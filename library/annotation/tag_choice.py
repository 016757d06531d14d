"""The labels of a tagger, and from their probabilities the tags of an image: pure functions."""

import csv
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from library.annotation.tag_options import TagOptions
from library.annotation.tag_texts import without_underscores
from library.config.errors import UserError, listed
from library.data.strict_json import read_utf8

log = logging.getLogger(__name__)

RATING, CHARACTER = "9", "4"
"""The numbers of categories in selected_tags.csv, which are Danbooru's; 9 is the tagger's. Others count as general."""
_COLUMNS = ("name", "category")


class Label(NamedTuple):
    """What one output of the model means."""

    name: str
    category: str


class Tagged(NamedTuple):
    """The tags of an image by their kind, and all that are written, in their order."""

    rating: str
    characters: tuple[str, ...]
    general: tuple[str, ...]
    written: tuple[str, ...]


def read_labels(path: Path) -> list[Label]:
    """Return the labels in a selected_tags.csv, one for each output of the model.

    Raise `UserError` naming the line that is wrong.
    """
    rows = csv.reader(read_utf8(path, if_missing="It stands beside the model in its repository.").splitlines())
    header = next(rows, [])
    if not set(_COLUMNS) <= set(header):
        raise UserError(
            f"'{path}' is no list of labels: its first line has to name the columns {' and '.join(_COLUMNS)}.",
            "Take the file selected_tags.csv of the model.",
        )
    places = [header.index(name) for name in _COLUMNS]
    labels = []
    for number, row in enumerate(rows, start=2):
        if len(row) <= max(places) or not row[places[0]].strip():
            raise UserError(f"'{path}', line {number}: expected a name and a category, got {row}.", "Take it again.")
        labels.append(Label(*(row[place].strip() for place in places)))
    return labels


@dataclass(frozen=True)
class TagChoice:
    """Which tags are written of which labels. `written` has the tags of each label: several where one is expanded."""

    labels: tuple[Label, ...]
    written: tuple[tuple[str, ...], ...]
    options: TagOptions

    def tags_of(self, probabilities: Sequence[float]) -> Tagged:
        """Return the tags of an image from the probability of each label, in the order of the labels."""
        rating = self._rating(probabilities)
        characters = tuple(self._chosen(probabilities, is_character=True))
        general = tuple(self._chosen(probabilities, is_character=False))
        order = [*characters, *general] if self.options.character_tags_first else [*general, *characters]
        if rating and self.options.use_rating_tags:
            order.insert(0, rating)
        if rating and self.options.use_rating_tags_as_last_tag:
            order.append(rating)
        first = [tag for tag in self.options.first if tag in order]
        order = list(dict.fromkeys([*first, *order]))
        return Tagged(rating, characters, general, tuple(order))

    def _rating(self, probabilities: Sequence[float]) -> str:
        of_ratings = [index for index, label in enumerate(self.labels) if label.category == RATING]
        if not of_ratings:
            return ""
        best = max(of_ratings, key=lambda index: probabilities[index])
        return next((tag for tag in self.written[best] if not self._is_undesired(best, tag)), "")

    def _chosen(self, probabilities: Sequence[float], *, is_character: bool) -> Iterator[str]:
        own = self.options.character_threshold if is_character else self.options.general_threshold
        least = self.options.thresh if own is None else own
        for index, label in enumerate(self.labels):
            if probabilities[index] < least or label.category == RATING:
                continue
            if (label.category == CHARACTER) == is_character:
                yield from (tag for tag in self.written[index] if not self._is_undesired(index, tag))

    def _is_undesired(self, index: int, tag: str) -> bool:
        """Return whether a tag is undesired, as it is written or as the model names it."""
        return bool({tag, self.labels[index].name} & self.options.undesired)


def tag_choice(labels: Sequence[Label], options: TagOptions) -> TagChoice:
    """Return the choice of the options; name the tags to replace that no label has."""
    replacements = options.replacements
    replaced: set[str] = set()
    written = []
    for label in labels:
        names = _expanded(label, options)
        if options.remove_underscore:
            names = [without_underscores(name) for name in names]
        whole = options.caption_separator.join(names)
        known = next((each for each in (whole, label.name) if each in replacements), None)
        if known is not None:
            replaced.add(known)
            names = [replacements[known]]
        written.append(tuple(name for name in names if name))
    if unknown := sorted(replacements.keys() - replaced):
        log.warning("--tag_replacement: the model has no tags %s", listed(unknown))
    return TagChoice(tuple(labels), tuple(written), options)


def _expanded(label: Label, options: TagOptions) -> list[str]:
    name = label.name
    if not (options.character_tag_expand and label.category == CHARACTER and name.endswith(")") and "(" in name):
        return [name]
    character, _, series = name[:-1].rpartition("(")
    return [character.removesuffix("_"), series]
