"""The texts that are encoded before training are those that training meets."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.captions.draws import CaptionDraw
from library.captions.final_captions import CaptionPair, final_texts
from library.captions.listing import num_expansions, require_listable, texts_to_encode, unlistable_settings
from library.captions.rules import ZEROS, CaptionDropout, CaptionRules, PairRules
from library.config.errors import UserError

WILD = CaptionRules(enable_wildcard=True)


def listed(lines, rules=WILD, dropout=None, encoder="l"):
    pair = PairRules(rules, rules, dropout or CaptionDropout())
    return texts_to_encode(CaptionPair(lines, lines), pair, encoder, seed=5, key="01")


def met(lines, rules, num_visits, encoder="l"):
    pair = rules if isinstance(rules, PairRules) else PairRules(rules, rules)
    visits = [CaptionDraw(5, 1, "01", occurrence) for occurrence in range(num_visits)]
    texts = [final_texts(CaptionPair(lines, lines), pair, draw) for draw in visits]
    return {text.text_l if encoder == "l" else text.text_g for text in texts}


@pytest.mark.parametrize(
    ("lines", "rules", "texts"),
    [
        (("a {b|c}", "d"), CaptionRules(), ["a {b|c}"]),
        (("a",), CaptionRules(caption_prefix="x,", caption_suffix="y"), ["x, a y"]),
        (("a;b",), CaptionRules(secondary_separator=";"), ["a,b"]),
        (("a,b ||| c",), CaptionRules(keep_tokens_separator="|||"), ["a, b, c"]),
        (("a {b|c} {d|e}", "f"), WILD, ["a b d", "a b e", "a c d", "a c e", "f"]),
        (("a",), replace(WILD, caption_prefix="{x|y}"), ["x a", "y a"]),
        (("{a|b|a}", "b", "b"), WILD, ["a", "b"]),
    ],
)
def test_every_distinct_expansion_is_listed_once(lines, rules, texts):
    assert listed(lines, rules) == texts


def test_a_dropped_caption_is_one_text_more_and_zeros_are_none():
    dropout = CaptionDropout(caption_dropout_rate_l=0.1)
    assert listed(("a",), CaptionRules(), dropout, "l") == ["a", ""]
    assert listed(("a",), CaptionRules(), dropout, "g") == ["a"]
    assert listed(("a",), CaptionRules(dropped_caption=ZEROS), dropout, "l") == ["a"]
    assert listed(("",), CaptionRules(), CaptionDropout(caption_dropout_every_n_epochs=2)) == [""]


lines = st.lists(st.text(st.sampled_from("ab,;{|} "), max_size=10), min_size=1, max_size=3).map(tuple)
listable = st.builds(
    CaptionRules,
    caption_prefix=st.sampled_from(["", "{x|y}"]),
    enable_wildcard=st.booleans(),
    keep_tokens_separator=st.sampled_from(["", "b"]),
    secondary_separator=st.sampled_from(["", ";"]),
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(lines, listable, st.sampled_from([0.0, 0.3]))
def test_training_meets_the_listed_texts_and_no_others(lines, rules, rate):
    pair = PairRules(rules, rules, CaptionDropout(rate))
    texts = texts_to_encode(CaptionPair(lines, lines), pair, "g", seed=5, key="01")
    assert len(set(texts)) == len(texts) <= num_expansions(lines, rules) + 1
    found = met(lines, pair, 40 * len(texts), "g")
    assert found <= set(texts)
    if len(texts) <= 4:
        assert found == set(texts)


@pytest.mark.parametrize("encoder", ["l", "g"])
def test_drawn_variants_are_the_ones_that_training_meets(encoder):
    rules = CaptionRules(shuffle_caption=True, caption_variants=6)
    tags = ("a, b, c, d, e, f, g",)
    texts = listed(tags, rules, CaptionDropout(0.2), encoder)
    assert len(texts) == 7
    assert set(texts) == met(tags, PairRules(rules, rules, CaptionDropout(0.2)), 500, encoder)


def test_what_cannot_be_listed_is_named():
    assert unlistable_settings(WILD) == []
    random = CaptionRules(shuffle_caption=True, caption_tag_dropout_rate=0.1, token_warmup_step=5)
    assert unlistable_settings(random) == ["shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step"]
    assert unlistable_settings(replace(random, token_warmup_step=0.0, caption_variants=4)) == []


def test_expansions_are_counted_without_being_listed():
    assert num_expansions(("{a|b} " * 60,), WILD) == 2**60
    assert num_expansions(("{a|a}", "x", "x"), WILD) == 2
    assert num_expansions(("{a|b}", "x"), CaptionRules()) == 1


def test_images_with_too_many_expansions_are_named_ten_at_most():
    few = {"few": CaptionPair(("{a|b} " * 6,), ("{a|b} " * 7,))}
    require_listable(few, PairRules(WILD, CaptionRules()), "l")
    require_listable(few, PairRules(CaptionRules(), CaptionRules()), "g")
    require_listable(few, PairRules(CaptionRules(), replace(WILD, caption_variants=3)), "g")
    many = {f"image{number}": CaptionPair(("",), ("{a|b} " * 10,)) for number in range(12)}
    with pytest.raises(UserError) as error:
        require_listable(few | many, PairRules(WILD, WILD), "g")
    message = str(error.value)
    assert "the G captions of 13 images" in message
    assert "'few' (128), 'image0' (1,024)" in message
    assert "'image8' (1,024)" in message and "image9" not in message and "3 more" in message
    assert "--caption_variants_g" in message
