"""Routes that change captions: one of an image, many at once, undo and redo."""

from typing import Any

from starlette.requests import Request

from library.config.atomic_files import CannotWrite
from library.config.errors import UserError
from library.editing.caption_edits import Edit
from library.editing.caption_places import ABSENT, Place, read_place, tag_of
from library.editing.caption_search import found
from library.editing.caption_set import Member
from library.editing.caption_text import CaptionText, new_file
from library.editing.caption_writing import Outcome, redo, undo, write_step
from library.editing.set_edits import Plan, planned, planned_texts
from library.editing.undo_journal import Change
from studio.answers import Body, Stale, encoder, number, text
from studio.looking import caption_of
from studio.opened import Opened

_SHOWN_AT_ONCE = 200
_CHANGED_ELSEWHERE = "this caption has changed meanwhile, in another tab or by another program."


class Changing:
    """Answers that change what is open; each is written into the undo journal first."""

    def __init__(self, opened: Opened):
        self._opened = opened

    def caption(self, request: Request, body: Body) -> Any:
        """Write one caption if it still is what `If-Match` names: a variant, one more, one less, or all lines."""
        member = self._opened.captions.member(number(request.path_params["number"], "number"))
        each = encoder(request.path_params["encoder"])
        expected = request.headers.get("if-match", "").strip('"')
        if not expected:
            raise UserError("a change has to name the caption that it changes.", "Send If-Match.")
        place = member.places[each]
        content = read_place(place)
        if tag_of(content) != expected:
            raise Stale(_CHANGED_ELSEWHERE, caption_of(self._opened, member, each))
        after = _changed(content, body, place)
        if after == content:
            return {"caption": caption_of(self._opened, member, each), **self._opened.history()}
        outcome = write_step(
            self._opened.journal,
            f"{each.upper()} of {member.name}",
            [Change(place, content, after)],
            text(body, "group", "") or None,
        )
        if outcome.failed:
            raise CannotWrite(outcome.failed[0][1], "Nothing is lost: the text stays here.", is_temporary=True)
        if outcome.conflicts:
            raise Stale(_CHANGED_ELSEWHERE, caption_of(self._opened, member, each))
        result = self._opened.take_in(outcome, _client(request))
        return {**result, "caption": caption_of(self._opened, member, each)}

    def preview(self, request: Request, body: Body) -> Any:
        """What an edit of many captions would change, 200 changes from `offset` on, and the name of this plan."""
        plan = self._plan(body)
        first = number(body.get("offset", 0), "offset")
        return {
            "plan": plan.name,
            "what": plan.what,
            "num": len(plan.changes),
            "num_images": len({each.member.number for each in plan.changes}),
            "changes": [
                {
                    "id": each.member.number,
                    "name": each.member.name,
                    "encoder": each.encoder,
                    "before": each.before,
                    "after": each.after,
                }
                for each in plan.changes[first : first + _SHOWN_AT_ONCE]
            ],
            "left_out": [f"{member.name}: {why}" for member, why in plan.left_out[:_SHOWN_AT_ONCE]],
        }

    def apply(self, request: Request, body: Body) -> Any:
        """Make an edit of many captions as one step, if its plan is still the one that was shown."""
        with self._opened.edits:
            plan = self._plan(body)
            if plan.name != text(body, "plan"):
                raise Stale("captions have changed since the preview; look at it again.")
            changes = [each.change for each in plan.changes]

            def tell(done: int) -> None:
                if done % 100 == 0:
                    self._opened.hub.publish("writing", done=done, total=len(changes))

            outcome = write_step(self._opened.journal, plan.what, changes, progress=tell)
            return self._opened.take_in(outcome, _client(request))

    def undo(self, request: Request, body: Body) -> Any:
        """Take the last step back."""
        with self._opened.edits:
            return self._taken_in(undo(self._opened.journal), request, "there is nothing to undo.")

    def redo(self, request: Request, body: Body) -> Any:
        """Do again what was undone last."""
        with self._opened.edits:
            return self._taken_in(redo(self._opened.journal), request, "there is nothing to do again.")

    def _taken_in(self, outcome: Outcome | None, request: Request, if_none: str) -> Any:
        if outcome is None:
            raise UserError(if_none)
        return self._opened.take_in(outcome, _client(request))

    def caption_by_machine(self, request: Request, body: Body) -> Any:
        """Begin to caption images by machine; the texts are proposals, shown as the changes of an edit are."""
        self._opened.machines.start(text(body, "machine"), self._selected(body))
        return {}

    def cancel_machine(self, request: Request, body: Body) -> Any:
        """End that, with nothing written."""
        self._opened.machines.cancel()
        return {}

    def _plan(self, body: Body) -> Plan:
        if "machine" in body:
            return self._plan_of_machine()
        said = body.get("edit")
        if not isinstance(said, dict):
            raise UserError("expected an edit.")
        encoders = said.get("encoders")
        edit = Edit(
            kind=text(said, "kind"),
            encoders=tuple(encoder(each) for each in encoders) if isinstance(encoders, list) else (),
            find=text(said, "find", ""),
            by=text(said, "by", ""),
            reading=text(said, "reading", "tag"),
            matches_case=said.get("matches_case") is True,
            in_front=said.get("in_front") is True,
        )
        return planned(edit, self._selected(body), self._opened.captions)

    def _plan_of_machine(self) -> Plan:
        job = self._opened.machines.job
        if job is None:
            raise UserError("no captions were made by machine.")
        what = f"{job.machine.kind} by machine for {job.machine.encoder.upper()}"
        return planned_texts(what, job.machine.encoder, job.texts)

    def _selected(self, body: Body) -> list[Member]:
        ids = body.get("ids")
        if ids is None:
            return found(self._opened.captions, text(body, "query", ""), "number")
        if not isinstance(ids, list):
            raise UserError("expected 'ids' to be a list of numbers.")
        return [self._opened.captions.member(number(each, "ids")) for each in ids]


def _changed(content: bytes | None, body: Body, place: Place) -> bytes:
    """Return the bytes of a caption after what a request asks for."""
    caption = CaptionText.parse(content, f"'{place}'")
    if "raw" in body:
        changed = caption.with_text(text(body, "raw").replace("\r\n", "\n").replace("\r", "\n"))
    elif "add" in body:
        changed = caption.with_another(text(body, "add"))
    else:
        which = number(body.get("remove", body.get("variant")), "variant")
        if which >= len(caption.places):
            raise UserError("this variant does not exist.")
        changed = (
            caption.without_variant(which) if "remove" in body else caption.with_variant(which, text(body, "text"))
        )
    if tag_of(content) == ABSENT and place.key is None and "raw" not in body:
        changed = new_file(changed.variants)
    return changed.content()


def _client(request: Request) -> str:
    return request.headers.get("x-studio-client", "")[:64]
