"""Comparison 2: token ids of odd captions against OpenCLIP's own tokenizer, and where the two differ on purpose.

(tests/sdxl/test_tokenizers.py has the recorded ids of the reference at 75, 150 and 225 tokens.)
"""

import random

import pytest
from open_clip.tokenizer import SimpleTokenizer

from library.sdxl.tokenizers import END_TOKEN, PAD_G, PAD_L, START_TOKEN, tokenize

OPENCLIP = SimpleTokenizer()
MANY_WORDS = " ".join(f"cat{number}" if number % 7 else "astronaut," for number in range(300))


def words_of(caption: str, num_chunks: int = 20) -> list[int]:
    """Our ids of a caption without start, end and padding."""
    made = tokenize(caption, PAD_L, num_chunks)
    assert made.num_truncated == 0
    words = []
    for chunk in made.ids:
        words += chunk[1 : chunk.index(END_TOKEN)] if END_TOKEN in chunk[1:-1] else chunk[1:-1]
    return words


@pytest.mark.parametrize(
    "caption",
    [
        pytest.param(MANY_WORDS, id="300 words"),
        pytest.param("👩‍🚀🏳️‍🌈 🇩🇪 ☃️ 🚀🚀", id="emoji"),
        pytest.param("一只猫坐在沙发上，看着窗外。", id="Chinese"),
        pytest.param("“curly” ‘quotes’, it’s ‚low‘ «and» „German“", id="curly quotes"),
        pytest.param(
            "a &amp; b &lt;3 &quot;q&quot; it&#39;s &eacute;t&eacute;&nbsp;&amp;amp; &amp;lt;", id="HTML entities"
        ),
        pytest.param("a\x00b \x07bell \x1b[31mred\x1b[0m\x7f \x85next \x1c\x1d\x0b\x0c", id="control characters"),
        pytest.param("cafÃ© â€œquoteâ€\x9d l’Ã©tÃ© Ã¼ber schÃ¶n", id="mojibake"),
        pytest.param("\ufeff e\u0301 ﬁ ﬂ １２ ½ Ⅷ ² \u00ad \u200b İstanbul ẞ Σς ǅ", id="forms of letters"),
        pytest.param("don't IT'S we'Ll I'VE 'tis rock'n'roll 's", id="apostrophes"),
        pytest.param("", id="nothing"),
        pytest.param(" \t\r\n\u3000\u2028 ", id="spaces alone"),
        pytest.param("half a \ud83d surrogate", id="broken UTF-16"),
    ],
)
def test_words_are_those_of_openclip(caption: str):
    assert words_of(caption) == OPENCLIP.encode(caption)


def test_words_of_random_captions_are_those_of_openclip():
    pieces = [
        *(
            " ",
            "  ",
            ", ",
            ".",
            "!",
            "!!",
            "?",
            "'",
            "'s",
            "’",
            "\n",
            "-",
            "_",
            "/",
            "(",
            ")",
            ":1.2",
            "#",
            "@",
            "&",
            "1",
            "42",
        ),
        *(
            "cat",
            "Cat",
            "CAT",
            "naïve",
            "Ångström",
            "œuvre",
            "猫",
            "ネコ",
            "кот",
            "γάτα",
            "قط",
            "חתול",
            "แมว",
            "बिल्ली",
            "🐈",
        ),
        *("&amp;", "&gt;", "&#233;", "Ã©", "â€™", "\u0301", "\u200d", "\ufe0f", "\xa0", "½", "™", "№"),
    ]
    rng = random.Random(0)
    for _ in range(500):
        caption = "".join(rng.choices(pieces, k=rng.randrange(1, 25)))
        assert words_of(caption) == OPENCLIP.encode(caption), ascii(caption)


@pytest.mark.parametrize("num_chunks", [1, 2, 3])
def test_a_caption_of_300_words_is_cut_where_openclip_cuts_it_and_the_rest_counted(num_chunks: int):
    words = OPENCLIP.encode(MANY_WORDS)
    made = tokenize(MANY_WORDS, PAD_G, num_chunks)
    assert [id for chunk in made.ids for id in chunk[1:-1]] == words[: 75 * num_chunks]
    assert made.num_truncated == len(words) - 75 * num_chunks
    if num_chunks == 1:
        assert made.ids == OPENCLIP([MANY_WORDS]).tolist()


# -- where the golden values and OpenCLIP differ, and where neither has a say -----------------------------------------


@pytest.mark.parametrize(("text", "token"), [("<|startoftext|>", START_TOKEN), ("<|endoftext|>", END_TOKEN)])
def test_the_literal_text_of_a_special_token_is_that_token_as_in_the_golden_values(text: str, token: int):
    """In OpenCLIP it is six words. Kohya's family and diffusers read the token, and the golden values are theirs."""
    before, cat, dog = OPENCLIP.encode("a cat dog")
    assert tokenize(f"a cat {text} dog", PAD_G, 1).ids[0][:6] == [START_TOKEN, before, cat, token, dog, END_TOKEN]
    assert token not in OPENCLIP.encode(f"a cat {text} dog")


def test_beside_an_angle_bracket_html_entities_are_left_as_they_are():
    """ftfy leaves them in a text that has "<" and may be HTML. OpenCLIP resolves them after it, the reference not."""
    assert words_of("<b>salt &amp; pepper") == OPENCLIP.encode("<b>salt &amp;amp;amp; pepper")
