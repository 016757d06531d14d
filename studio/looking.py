"""Routes that look: the set, the images that a question finds, tags, one image, and what training makes of it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from starlette.requests import Request

from library.captions.drawn_captions import DrawnCaption, drawn_captions
from library.captions.draws import ENCODERS, Encoder
from library.captions.final_captions import CaptionPair
from library.captions.limits import reading
from library.captions.rules import CaptionRules
from library.config.errors import UserError
from library.data.caption_notices import looks_like_sentences, words_of
from library.editing.caption_places import read_place, tag_of
from library.editing.caption_search import HELP, ORDERS, found
from library.editing.caption_set import Member, text_of
from library.editing.caption_text import CaptionText
from library.images.crops import true_crop_ltrb
from library.sdxl.tokenizers import cleaned
from studio.answers import Body, encoder, number, text
from studio.opened import Opened

_NUM_DRAWS = 10
_MOST_TAGS = 2000
_LONGEST_ONLY_TAG = 3  # words


class Looking:
    """Answers about what is open; nothing is changed."""

    def __init__(self, opened: Opened):
        self._opened = opened

    def set(self, request: Request, body: Body) -> Any:
        """What is open, and how far it has been read."""
        captions = self._opened.captions
        counts = [0] * len(captions.subsets)
        for member in captions.members:
            counts[member.subset] += 1
        return {
            "names": [str(subset.image_dir) for subset in captions.subsets],
            "counts": counts,
            "is_loaded": captions.is_loaded,
            "progress": self._opened.progress,
            "orders": ORDERS,
            "help": HELP,
            "machines": list(self._opened.machines.offered),
            **self._opened.history(),
        }

    def view(self, request: Request, body: Body) -> Any:
        """The images that a question finds, in order: numbers, names, and tokens of both captions.

        Tokens are -1 without a text, -2 before they are counted and -3 for a caption that cannot be read.
        """
        with self._opened.urgent():
            return self._view(request.query_params)

    def _view(self, asked: Mapping[str, str]) -> Any:
        captions = self._opened.captions
        members = found(
            captions,
            asked.get("query", ""),
            asked.get("order", "name"),
            descending=asked.get("descending") == "1",
        )
        return {
            "revision": captions.revision,
            "total": len(captions.members),
            "ids": [member.number for member in members],
            "names": [member.name for member in members],
            "versions": [int(member.modified) for member in members],
            "l": [_tokens_of(member, "l") for member in members],
            "g": [_tokens_of(member, "g") for member in members],
            "over": [self._over(member) for member in members],
        }

    def tags(self, request: Request, body: Body) -> Any:
        """The tags of one encoder with their counts, most frequent first; those that begin with `prefix`."""
        asked = request.query_params
        captions = self._opened.captions
        query = asked.get("query", "")
        members = found(captions, query, "number") if query else None
        counts = captions.tag_counts(encoder(asked.get("encoder")), members)
        prefix = asked.get("prefix", "").strip().casefold()
        limit = min(_MOST_TAGS, number(asked.get("limit", "200"), "limit"))
        chosen = [
            (tag, count)
            for tag, count in counts.items()
            if not prefix or any(word.startswith(prefix) for word in (tag.casefold(), *tag.casefold().split()))
        ]
        chosen.sort(key=lambda each: (bool(prefix) and each[0].casefold() != prefix, -each[1], len(each[0]), each[0]))
        return {"tags": chosen[:limit], "num": len(chosen)}

    def image(self, request: Request, body: Body) -> Any:
        """One image with both captions as they are on the disk."""
        member = self._member(request)
        crop = None
        if member.size is not None:
            rule = self._opened.captions.subsets[member.subset].rule
            try:
                assigned = rule.assign(member.size)
                left, top, right, bottom = true_crop_ltrb(assigned.bucket, assigned.resized)
                width, height = assigned.resized
                crop = [left / width, top / height, (right - left) / width, (bottom - top) / height]
            except UserError:
                crop = None
        return {
            "id": member.number,
            "name": member.name,
            "subset": str(self._opened.captions.subsets[member.subset].image_dir),
            "size": member.size,
            "bucket": member.bucket,
            "crop": crop,
            "version": int(member.modified),
            "problem": member.problem,
            "captions": {each: caption_of(self._opened, member, each) for each in ENCODERS},
        }

    def count(self, request: Request, body: Body) -> Any:
        """How both encoders read two texts, and the words that stand in both."""
        member = self._opened.captions.member(number(body.get("id"), "id"))
        rules = self._opened.captions.rules(member)
        counted: dict[str, Any] = {}
        for each in ENCODERS:
            typed = text(body, each, "")
            try:
                final = text_of(typed, rules, each)
                read = reading(final, rules.of(each))
            except UserError as error:
                counted[each] = {"problem": str(error)}
                continue
            clean = cleaned(final)
            counted[each] = {
                "num_tokens": read.num_tokens,
                "limit": read.limit,
                "cut": read.cut,
                "final": final if final != typed else None,
                "cleaned": clean if clean != final else None,
            }
        counted["shared"] = sorted(words_of(text(body, "l", "")) & words_of(text(body, "g", "")))
        return counted

    def draws(self, request: Request, body: Body) -> Any:
        """Ten draws of both final captions of an image."""
        member = self._member(request)
        captions = self._opened.captions
        subset = captions.subsets[member.subset]
        variants = [self._variants(member, each, subset.class_tokens) for each in ENCODERS]
        pairs = self._opened.draw(
            partial(
                drawn_captions,
                CaptionPair(*variants),
                subset.captions,
                key=member.key,
                seed=self._opened.seed,
                first_epoch=max(1, number(request.query_params.get("first", "1"), "first")),
                num_epochs=_NUM_DRAWS,
            )
        )
        drawn = [{"epoch": pair.epoch, "l": _drawn(pair.caption_l), "g": _drawn(pair.caption_g)} for pair in pairs]
        warms_up = any(subset.captions.of(each).token_warmup_step > 0 for each in ENCODERS)
        return {"draws": drawn, "seed": self._opened.seed, "warms_up": warms_up}

    def _variants(self, member: Member, each: Encoder, if_missing: str | None) -> tuple[str, ...]:
        content = read_place(member.places[each])
        if content is not None:
            return CaptionText.parse(content, f"'{member.places[each]}'").variants
        if if_missing is None:
            raise UserError(
                f"there is no {each.upper()} caption, and training would refuse this image.",
                "Write one; it may be empty.",
            )
        return (if_missing,)

    def _member(self, request: Request) -> Member:
        return self._opened.captions.member(number(request.path_params["number"], "number"))

    def _over(self, member: Member) -> int:
        """1 if L is over its limit, 2 if G is, 3 if both are."""
        rules = self._opened.captions.rules(member)
        return sum(
            bit
            for bit, each in ((1, "l"), (2, "g"))
            if each in member.captions and member.captions[each].num_tokens > rules.of(each).max_token_length
        )


def caption_of(opened: Opened, member: Member, each: Encoder) -> dict[str, Any]:
    """Return a caption as it is on the disk, as JSON; `tag` is what a change of it has to name."""
    place = member.places[each]
    rules = opened.captions.rules(member).of(each)
    shown: dict[str, Any] = {
        "where": place.path.name if place.key is None else f"{place.path.name}: {place.name}",
        "limit": rules.max_token_length,
        "separator": rules.caption_separator,
        "uses_all": rules.enable_wildcard,
    }
    try:
        content = read_place(place)
        caption = CaptionText.parse(content, f"'{place}'")
    except UserError as error:
        return {**shown, "tag": None, "exists": True, "text": "", "variants": [""], "problem": str(error)}
    variants = [caption.lines[number].text for number in caption.places]
    return {
        **shown,
        "tag": tag_of(content),
        "exists": content is not None,
        "text": caption.text,
        "variants": variants,
        "is_prose": _is_prose(variants[0], rules) if variants[0].strip() else each == "g",
        "problem": None,
    }


def _is_prose(variant: str, rules: CaptionRules) -> bool:
    """Return whether a caption is better shown as text than as tags."""
    is_one_piece = rules.caption_separator not in variant and len(variant.split()) > _LONGEST_ONLY_TAG
    return is_one_piece or variant.rstrip().endswith(".") or looks_like_sentences(variant, rules)


def _drawn(caption: DrawnCaption) -> dict[str, Any]:
    return {"is_dropped": caption.is_dropped, "reading": caption.reading._asdict()}


def _tokens_of(member: Member, each: Encoder) -> int:
    state = member.captions.get(each)
    if state is None:
        return -2
    if state.problem is not None:
        return -3
    return -1 if state.is_blank else state.num_tokens
