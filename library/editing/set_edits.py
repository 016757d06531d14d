"""A step over many images: every change before it is made, and a name for them that a later change spoils."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from library.captions.draws import ENCODERS, Encoder
from library.config.digests import digest
from library.config.errors import UserError
from library.editing.caption_edits import Edit, EditedPair, edited
from library.editing.caption_places import Place, read_places, tag_of
from library.editing.caption_set import CaptionSet, Member
from library.editing.caption_text import CaptionText
from library.editing.undo_journal import Change


@dataclass(frozen=True)
class PlannedChange:
    """A caption of an image before and after; the texts are those of all lines."""

    member: Member
    encoder: Encoder
    before: str
    after: str
    change: Change


@dataclass(frozen=True)
class Plan:
    """The changes of one step. Images whose captions cannot be read are left out, and named with the reason."""

    what: str
    changes: tuple[PlannedChange, ...]
    left_out: tuple[tuple[Member, str], ...]

    @property
    def name(self) -> str:
        """What tells this plan from one over other captions, or to other ones."""
        tags = (
            f"{each.change.place} {tag_of(each.change.before)} {tag_of(each.change.after)}" for each in self.changes
        )
        return digest([part.encode("utf-8", errors="surrogatepass") + b"\0" for part in (self.what, *tags)]).hex()


_Captions = dict[Encoder, CaptionText | None]
_Changing = Callable[[Member, _Captions], Mapping[Encoder, CaptionText | None]]
"""From an image and both captions to both captions as they shall be; the same objects where nothing changes."""


def planned(edit: Edit, members: Sequence[Member], caption_set: CaptionSet) -> Plan:
    """Return what an edit would change in the captions as they are on the disk. Raise `UserError` for a wrong edit."""
    problem = edit.problem()
    if problem is not None:
        raise UserError(problem)

    def change(member: Member, captions: _Captions) -> Mapping[Encoder, CaptionText | None]:
        rules = caption_set.rules(member)
        return edited(edit, EditedPair(captions, {each: rules.of(each).caption_separator for each in ENCODERS}))

    return _plan(edit.what, members, change)


def planned_texts(what: str, encoder: Encoder, texts: Mapping[Member, str]) -> Plan:
    """Return what writing a text for each image would change: the first variant of the caption of one encoder."""

    def change(member: Member, captions: _Captions) -> Mapping[Encoder, CaptionText | None]:
        old = captions[encoder] or CaptionText.parse(None)
        is_same = old.lines[old.places[0]].text == texts[member]
        return captions if is_same else {**captions, encoder: old.with_variant(0, texts[member])}

    return _plan(what, list(texts), change)


def _plan(what: str, members: Sequence[Member], change: _Changing) -> Plan:
    contents = read_places([place for member in members for place in member.places.values()])
    changes: dict[Place, PlannedChange] = {}
    left_out = []
    for member in members:
        own = {encoder: contents[member.places[encoder]] for encoder in ENCODERS}
        try:
            for each in _of_member(member, own, change):
                changes.setdefault(each.change.place, each)  # images may share a caption file
        except UserError as error:
            left_out.append((member, str(error)))
    return Plan(what, tuple(changes.values()), tuple(left_out))


def _of_member(
    member: Member, contents: Mapping[Encoder, bytes | UserError | None], change: _Changing
) -> Iterator[PlannedChange]:
    captions: _Captions = {}
    for encoder, content in contents.items():
        if isinstance(content, UserError):
            raise content
        captions[encoder] = None if content is None else CaptionText.parse(content, f"'{member.places[encoder]}'")
    for encoder, new in change(member, captions).items():
        old, content = captions[encoder], contents[encoder]
        assert not isinstance(content, UserError)
        if new is None or new is old or new.content() == (content or b""):
            continue
        is_new_file = old is None and member.places[encoder].key is None
        made = new.content() + (b"\n" if is_new_file else b"")
        before = "" if old is None else old.text
        yield PlannedChange(member, encoder, before, new.text, Change(member.places[encoder], content, made))
