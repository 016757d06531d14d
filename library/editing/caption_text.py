"""The bytes of a caption file as lines, of which one can change while all others keep every byte."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import NamedTuple

from library.data.strict_json import BYTE_ORDER_MARK, exact_utf8

_LINE = re.compile(r"([^\r\n]*)(\r\n|\n|\r|\Z)")
_LINE_ENDS = re.compile(r"\r\n|\n|\r")


class Line(NamedTuple):
    """The text of a line, and what ends it: "" at the end of a file."""

    text: str
    end: str


@dataclass(frozen=True)
class CaptionText:
    """The lines of a caption file. Those that hold anything are the variants of the caption; there is always a line."""

    lines: tuple[Line, ...]
    has_byte_order_mark: bool = False

    @classmethod
    def parse(cls, content: bytes | None, where: str = "the caption") -> "CaptionText":
        """Return the lines of a file, None being one that does not exist. Raise `UserError` unless it is UTF-8."""
        text = exact_utf8(content or b"", where)
        body = text.removeprefix(BYTE_ORDER_MARK)
        lines = [Line(match[1], match[2]) for match in _LINE.finditer(body) if match[0]]
        return cls(tuple(lines) or (Line("", ""),), has_byte_order_mark=body != text)

    def content(self) -> bytes:
        """Return the bytes of the file."""
        mark = BYTE_ORDER_MARK if self.has_byte_order_mark else ""
        return (mark + "".join(line.text + line.end for line in self.lines)).encode("utf-8")

    @property
    def text(self) -> str:
        """All lines, joined by "\\n", as a person reads them."""
        return "".join(line.text + ("\n" if line.end else "") for line in self.lines)

    @property
    def places(self) -> tuple[int, ...]:
        """The numbers of the lines that are variants; the first line where none holds anything."""
        return tuple(number for number, line in enumerate(self.lines) if line.text.strip()) or (0,)

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants as training reads them: without blanks around the whole text."""
        texts = [self.lines[place].text for place in self.places]
        texts[0] = texts[0].lstrip()
        texts[-1] = texts[-1].rstrip()
        return tuple(texts)

    def with_variant(self, number: int, text: str) -> "CaptionText":
        """Return the file with another text as variant `number`; line ends in the text become spaces.

        Raise `IndexError` if there is no such variant.
        """
        place = self.places[number]
        line = self.lines[place]._replace(text=_LINE_ENDS.sub(" ", text))
        return replace(self, lines=(*self.lines[:place], line, *self.lines[place + 1 :]))

    def with_another(self, text: str) -> "CaptionText":
        """Return the file with one more variant behind all others."""
        last = self.lines[-1]
        if not last.end and not last.text:
            return replace(self, lines=(*self.lines[:-1], last._replace(text=_LINE_ENDS.sub(" ", text))))
        ended = last._replace(end=last.end or self._usual_end)
        return replace(self, lines=(*self.lines[:-1], ended, Line(_LINE_ENDS.sub(" ", text), last.end)))

    def without_variant(self, number: int) -> "CaptionText":
        """Return the file without the line of variant `number`. Raise `IndexError` if there is no such variant."""
        place = self.places[number]
        lines = [*self.lines[:place], *self.lines[place + 1 :]]
        if place == len(self.lines) - 1 and lines:  # the file ends as it did
            lines[-1] = lines[-1]._replace(end=self.lines[place].end)
        return replace(self, lines=tuple(lines) or (Line("", ""),))

    def with_text(self, text: str) -> "CaptionText":
        """Return the file with other lines; those that stay keep their line ends, new ones have the usual end."""
        wanted = [Line(match[1], match[2]) for match in _LINE.finditer(text) if match[0]]
        old, new = [line.text for line in self.lines], [line.text for line in wanted]
        lines: list[Line] = []
        for kind, first, end, first_new, end_new in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            if kind == "equal":
                lines += self.lines[first:end]
            else:
                lines += [Line(line, self._usual_end) for line in new[first_new:end_new]]
        lines = [line._replace(end=line.end or self._usual_end) for line in lines[:-1]] + lines[-1:]
        if lines and bool(lines[-1].end) != bool(wanted[-1].end):
            lines[-1] = lines[-1]._replace(end=self._usual_end if wanted[-1].end else "")
        return replace(self, lines=tuple(lines) or (Line("", ""),))

    @property
    def _usual_end(self) -> str:
        ends = [line.end for line in self.lines if line.end]
        return max(ends, key=ends.count) if ends else "\n"


def new_file(variants: Iterable[str]) -> CaptionText:
    """Return a caption file of these variants."""
    return CaptionText(tuple(Line(_LINE_ENDS.sub(" ", text), "\n") for text in variants) or (Line("", ""),))
