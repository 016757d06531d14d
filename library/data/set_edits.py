"""An edit over many images: every change before it is made, and a name for them that a later change spoils."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from library.config.digests import digest
from library.config.errors import UserError
from library.data.caption_draws import ENCODERS, Encoder
from library.data.caption_edits import Edit, EditedPair, edited
from library.data.caption_places import read_places, tag_of
from library.data.caption_set import CaptionSet, Member
from library.data.caption_text import CaptionText
from library.data.undo_journal import Change


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
    """The changes of an edit. Images whose captions cannot be read are left out, and named with the reason."""

    edit: Edit
    changes: tuple[PlannedChange, ...]
    left_out: tuple[tuple[Member, str], ...]

    @property
    def name(self) -> str:
        """What tells this plan from one over other captions, or of another edit."""
        parts = [str(self.edit), *(f"{each.change.place}{tag_of(each.change.before)}" for each in self.changes)]
        return digest([part.encode("utf-8", errors="surrogatepass") + b"\0" for part in parts]).hex()


def planned(edit: Edit, members: Sequence[Member], caption_set: CaptionSet) -> Plan:
    """Return what an edit would change in the captions as they are on the disk. Raise `UserError` for a wrong edit."""
    problem = edit.problem()
    if problem is not None:
        raise UserError(problem)
    contents = read_places([place for member in members for place in member.places.values()])
    changes: dict[object, PlannedChange] = {}
    left_out = []
    for member in members:
        own = {encoder: contents[member.places[encoder]] for encoder in ENCODERS}
        try:
            for each in _of_member(edit, member, own, caption_set):
                changes.setdefault(each.change.place, each)  # images may share a caption file
        except UserError as error:
            left_out.append((member, str(error)))
    return Plan(edit, tuple(changes.values()), tuple(left_out))


def _of_member(
    edit: Edit, member: Member, contents: dict[Encoder, bytes | UserError | None], caption_set: CaptionSet
) -> Iterator[PlannedChange]:
    captions: dict[Encoder, CaptionText | None] = {}
    for encoder, content in contents.items():
        if isinstance(content, UserError):
            raise content
        captions[encoder] = None if content is None else CaptionText.parse(content, f"'{member.places[encoder]}'")
    rules = caption_set.rules(member)
    after = edited(edit, EditedPair(captions, {encoder: rules.of(encoder).caption_separator for encoder in ENCODERS}))
    for encoder, new in after.items():
        old = captions[encoder]
        if new is None or new is old:
            continue
        content = contents[encoder]
        assert not isinstance(content, UserError)
        made = new.content()
        if made != (content or b""):
            before = "" if old is None else old.text
            made = made if old is not None or member.places[encoder].key is not None else made + b"\n"
            yield PlannedChange(member, encoder, before, new.text, Change(member.places[encoder], content, made))
