"""One line of a caption file changes, and every other byte stays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.config.errors import UserError
from library.editing.caption_text import CaptionText, new_file

CRLF = "\ufeff1girl, cat\r\n\r\nsecond line\r\n  third \n".encode()


@given(st.lists(st.sampled_from(["a", " ", "\n", "\r\n", "\r", "é", "\u2028", "\x0b", "\ufeff"]), max_size=12))
def test_what_is_not_changed_keeps_every_byte(parts):
    content = "".join(parts).encode()
    text = CaptionText.parse(content)
    assert text.content() == content
    assert text.with_text(text.text).content() == content
    assert text.with_variant(0, text.lines[text.places[0]].text).content() == content


def test_variants_are_the_lines_that_training_reads():
    text = CaptionText.parse(CRLF)
    assert text.variants == ("1girl, cat", "second line", "  third")
    assert text.places == (0, 2, 3)
    assert CaptionText.parse(None).variants == CaptionText.parse(b"\n\n").variants == ("",)


def test_one_variant_changes_and_the_others_stay():
    changed = CaptionText.parse(CRLF).with_variant(1, "another\nline")
    assert changed.content() == CRLF.replace(b"second line", b"another line")


def test_variants_are_added_and_removed():
    text = CaptionText.parse(b"a\r\nb\r\nc")
    assert text.with_another("d").content() == b"a\r\nb\r\nc\r\nd"
    assert text.without_variant(1).content() == b"a\r\nc"
    assert text.without_variant(2).content() == b"a\r\nb"
    assert CaptionText.parse(b"a").without_variant(0).content() == b""
    assert CaptionText.parse(b"").with_another("x").content() == b"x"
    assert CaptionText.parse(b"a\n").with_another("x").content() == b"a\nx\n"


def test_the_raw_view_keeps_the_ends_of_lines_that_stay():
    text = CaptionText.parse(b"a\r\nb\nc\r\n")
    assert text.with_text("a\nnew\nb\nc\n").content() == b"a\r\nnew\r\nb\nc\r\n"
    assert text.with_text("a\nb\nc").content() == b"a\r\nb\nc"
    assert text.with_text("").content() == b""


def test_a_new_file_ends_in_a_line_end():
    assert new_file(["one", "two\r\nlines"]).content() == b"one\ntwo lines\n"
    assert new_file([]).content() == b""


def test_what_is_no_utf_8_is_refused():
    with pytest.raises(UserError, match=r"'x\.txt' is not UTF-8: byte 1 is 0xff"):
        CaptionText.parse(b"a\xff", "'x.txt'")
