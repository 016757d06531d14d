"""What training does to captions: each encoder by its rules, each visit by its own numbers."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.captions.draws import CaptionDraw
from library.captions.final_captions import CaptionPair, final_texts, first_text, split_wildcards, variants_of
from library.captions.rules import CaptionDropout, CaptionRules, PairRules

TAGS = "1girl, solo, red hair, blue eyes, smile, park, sky, tree"
PAIR = CaptionPair((TAGS,), (TAGS,))
DRAW = CaptionDraw(seed=3, epoch=1, key="01")
PLAIN = CaptionRules()
SHUFFLED = CaptionRules(shuffle_caption=True)

fuzzed = settings(max_examples=200, deadline=None, derandomize=True, database=None)
rates = st.sampled_from([0.0, 0.3, 1.0])
texts = st.text(st.sampled_from("ab ,;{|}猫"), max_size=30)
some_rules = st.builds(
    CaptionRules,
    caption_prefix=st.sampled_from(["", "pre,"]),
    caption_suffix=st.sampled_from(["", ", end"]),
    enable_wildcard=st.booleans(),
    shuffle_caption=st.booleans(),
    keep_tokens=st.integers(0, 3),
    keep_tokens_separator=st.sampled_from(["", "|||", "b"]),
    secondary_separator=st.sampled_from(["", ";"]),
    caption_tag_dropout_rate=rates,
    protected_tags=st.sampled_from([frozenset(), frozenset({"a", "b a"})]),
    token_warmup_step=st.sampled_from([0.0, 0.5, 10]),
    caption_variants=st.sampled_from([0, 3]),
)
variants = st.lists(texts, min_size=1, max_size=3).map(tuple)
draws = st.builds(
    CaptionDraw,
    seed=st.integers(0, 9),
    epoch=st.integers(1, 4),
    key=st.sampled_from(["01", "02"]),
    occurrence=st.integers(0, 3),
    step=st.integers(0, 20),
    max_train_steps=st.just(20),
)


def text_l(caption, rules, draw=DRAW):
    return final_texts(CaptionPair(variants_of(caption), ("",)), PairRules(rules_l=rules), draw).text_l


def visits(num_visits):
    return [DRAW._replace(occurrence=occurrence) for occurrence in range(num_visits)]


# -- the two encoders -------------------------------------------------------------------------------------------------


@fuzzed
@given(variants, variants, some_rules, some_rules, some_rules, draws, st.booleans())
def test_no_setting_of_one_encoder_changes_the_text_of_the_other(
    lines_l, lines_g, rules_l, other_l, rules_g, draw, shared
):
    captions = CaptionPair(lines_l, lines_g)
    one = final_texts(captions, PairRules(rules_l, rules_g, shared=shared), draw)
    other = final_texts(captions, PairRules(other_l, rules_g, shared=shared), draw)
    assert one.text_g == other.text_g
    turned = final_texts(captions, PairRules(rules_g, rules_l, shared=shared), draw)
    assert turned.text_l == final_texts(captions, PairRules(rules_g, other_l, shared=shared), draw).text_l


@fuzzed
@given(variants, some_rules, draws)
def test_shared_draws_leave_equal_captions_with_equal_rules_equal(lines, rules, draw):
    made = final_texts(CaptionPair(lines, lines), PairRules(rules, rules, shared=True), draw)
    assert made.text_l == made.text_g


def test_draws_apart_shuffle_equal_captions_differently():
    made = [final_texts(PAIR, PairRules(SHUFFLED, SHUFFLED), draw) for draw in visits(20)]
    assert sum(each.text_l != each.text_g for each in made) >= 19
    assert all(sorted(each.text_l.split(", ")) == sorted(each.text_g.split(", ")) for each in made)


def test_shared_draws_choose_line_i_for_both():
    captions = CaptionPair(("l0", "l1", "l2"), ("g0", "g1", "g2"))
    rules = CaptionRules(enable_wildcard=True)
    made = [final_texts(captions, PairRules(rules, rules, shared=True), draw) for draw in visits(50)]
    assert {(each.text_l, each.text_g) for each in made} == {("l0", "g0"), ("l1", "g1"), ("l2", "g2")}


# -- nothing but the key of a visit counts ----------------------------------------------------------------------------

EVERYTHING = CaptionRules(
    caption_prefix="style,",
    enable_wildcard=True,
    shuffle_caption=True,
    keep_tokens=1,
    caption_tag_dropout_rate=0.3,
    token_warmup_step=0.5,
)
EVERYTHING_OF_A_PAIR = PairRules(EVERYTHING, EVERYTHING, CaptionDropout(0.1, 0.1, 0.1))


def test_texts_do_not_depend_on_what_was_drawn_before():
    captions = CaptionPair(("{red|blue} sky, a, b, c, d", "e, f, g"), ("a {dog|cat}, x, y, z",))
    all_draws = [
        CaptionDraw(1, epoch, key, occurrence, step=epoch, max_train_steps=9)
        for epoch in (1, 2, 3)
        for key in ("01", "02", "sub/03")
        for occurrence in range(5)
    ]
    in_order = {draw: final_texts(captions, EVERYTHING_OF_A_PAIR, draw) for draw in all_draws}
    random.Random(0).shuffle(all_draws)
    random.seed(1)
    before = random.getstate()
    assert {draw: final_texts(captions, EVERYTHING_OF_A_PAIR, draw) for draw in all_draws} == in_order
    assert random.getstate() == before
    assert len(set(in_order.values())) > 30


def test_another_operation_moves_no_number_of_the_first():
    with_dropout = replace(SHUFFLED, caption_tag_dropout_rate=0.5)
    shuffled = text_l(TAGS, SHUFFLED).split(", ")
    kept = text_l(TAGS, with_dropout).split(", ")
    assert kept == [tag for tag in shuffled if tag in kept]
    assert 0 < len(kept) < len(shuffled)


# -- whole captions ---------------------------------------------------------------------------------------------------


def test_the_table_of_dropout_has_the_frequencies_asked_for():
    num_draws = 100_000
    rules = PairRules(dropout=CaptionDropout(0.1, 0.05, 0.2))
    captions = CaptionPair(("l",), ("g",))
    counts = Counter(final_texts(captions, rules, draw)[2:] for draw in visits(num_draws))
    for event, rate in {(True, True): 0.1, (True, False): 0.05, (False, True): 0.2, (False, False): 0.65}.items():
        assert abs(counts[event] - rate * num_draws) <= 4 * (rate * (1 - rate) * num_draws) ** 0.5, event


def test_tags_are_dropped_as_often_as_asked_for():
    num_visits = 20_000
    rules = CaptionRules(caption_tag_dropout_rate=0.3)
    counts = Counter(tag for draw in visits(num_visits) for tag in text_l(TAGS, rules, draw).split(", ") if tag)
    for tag in TAGS.split(", "):
        assert abs(counts[tag] - 0.7 * num_visits) <= 4 * (0.3 * 0.7 * num_visits) ** 0.5, tag


@fuzzed
@given(variants, variants, some_rules, draws)
def test_a_dropped_caption_is_empty_and_leaves_the_other_alone(lines_l, lines_g, rules, draw):
    captions = CaptionPair(lines_l, lines_g)
    dropped = final_texts(captions, PairRules(rules, rules, CaptionDropout(caption_dropout_rate_l=1.0)), draw)
    whole = final_texts(captions, PairRules(rules, rules), draw)
    assert dropped == ("", whole.text_g, True, False)


@pytest.mark.parametrize(
    ("dropout", "dropped"),
    [
        (CaptionDropout(caption_dropout_every_n_epochs=2), [(False, False), (True, True)] * 3),
        (CaptionDropout(caption_dropout_every_n_epochs_l=3), [(False, False)] * 2 + [(True, False)]),
        (CaptionDropout(caption_dropout_every_n_epochs_g=1), [(False, True)]),
        (
            CaptionDropout(caption_dropout_every_n_epochs=4, caption_dropout_every_n_epochs_l=2),
            [(False, False), (True, False), (False, False), (True, True)],
        ),
    ],
)
def test_captions_are_dropped_in_every_nth_epoch_counted_from_one(dropout, dropped):
    made = [
        final_texts(PAIR, PairRules(dropout=dropout), DRAW._replace(epoch=1 + past)) for past in range(len(dropped))
    ]
    assert [each[2:] for each in made] == dropped


def test_what_is_dropped_sometimes_is_known():
    assert not CaptionDropout(caption_dropout_rate_l=0.1).drops("g")
    assert CaptionDropout(caption_dropout_rate_l=0.1).drops("l")
    assert CaptionDropout(caption_dropout_rate=0.1).drops("g")
    assert CaptionDropout(caption_dropout_every_n_epochs_g=3).drops("g")
    assert not CaptionDropout(caption_dropout_every_n_epochs_g=3).drops("l")


# -- tags -------------------------------------------------------------------------------------------------------------


@fuzzed
@given(texts, some_rules.map(lambda rules: replace(rules, caption_prefix="", caption_suffix="", enable_wildcard=False)))
def test_a_text_whose_tags_nothing_happens_to_stays_byte_for_byte(text, rules):
    untouched = replace(
        rules,
        shuffle_caption=False,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0.0,
        keep_tokens_separator="",
        secondary_separator="",
    )
    assert text_l(text, untouched) == text


@fuzzed
@given(texts, draws)
def test_the_separator_of_kept_tags_reaches_no_encoder(text, draw):
    rules = CaptionRules(keep_tokens_separator="b", shuffle_caption=True)
    assert "b" not in text_l(text, rules, draw)
    assert "b" not in text_l(text, replace(rules, shuffle_caption=False), draw)


@fuzzed
@given(st.lists(st.sampled_from("abcdef"), max_size=12), st.integers(0, 5), draws)
def test_shuffling_keeps_every_tag_and_the_first_ones_in_place(tags, keep_tokens, draw):
    shuffled = text_l(",".join(tags), replace(SHUFFLED, keep_tokens=keep_tokens), draw)
    result = shuffled.split(", ") if shuffled else []
    assert result[:keep_tokens] == tags[:keep_tokens]
    assert sorted(result) == sorted(tags)


def test_protected_tags_are_never_dropped_and_may_be_shuffled():
    rules = CaptionRules(
        caption_tag_dropout_rate=1.0, shuffle_caption=True, protected_tags=frozenset({"solo", "1girl", "sky"})
    )
    made = {text_l(" 1Girl, SOLO , red hair, solo dance, sky", rules, draw) for draw in visits(50)}
    assert {tuple(sorted(text.split(", "))) for text in made} == {("1Girl", "SOLO", "sky")}
    assert len(made) == 6


def test_warmup_takes_the_first_tags_as_written_before_it_shuffles():
    rules = CaptionRules(shuffle_caption=True, token_warmup_step=10, token_warmup_min=2)
    for step, count in ((0, 2), (5, 5), (9, 7), (10, 8), (11, 8)):
        tags = text_l(TAGS, rules, DRAW._replace(step=step)).split(", ")
        assert sorted(tags) == sorted(TAGS.split(", ")[:count])


def test_a_warmup_below_one_is_a_fraction_of_the_run():
    rules = CaptionRules(token_warmup_step=0.5)
    assert text_l("a, b, c", rules, DRAW._replace(step=2, max_train_steps=8)) == "a, b"
    assert text_l("a, b, c", rules, DRAW._replace(step=4, max_train_steps=8)) == "a, b, c"


# -- variants ---------------------------------------------------------------------------------------------------------


def test_lines_of_texts_and_texts_of_lists_are_variants():
    assert variants_of("a\nb") == variants_of(["a", "b"]) == ("a", "b")
    assert variants_of(["a\nb", "c"]) == ("a", "b", "c")
    assert variants_of("") == ("",)


def test_without_wildcards_the_first_line_is_used():
    assert {text_l("{a|b}\nc", PLAIN, draw) for draw in visits(20)} == {"{a|b}"}
    assert {text_l("{a|b}\nc", CaptionRules(enable_wildcard=True), draw) for draw in visits(20)} == {"a", "b", "c"}


def test_prefix_and_suffix_surround_the_line_that_was_drawn():
    rules = CaptionRules(enable_wildcard=True, caption_prefix="{x|y}", caption_suffix="z")
    made = {text_l("a\nb", rules, draw) for draw in visits(50)}
    assert made == {"x a z", "y a z", "x b z", "y b z"}


def test_drawn_variants_are_as_many_texts_as_asked_for_each_used_alike():
    num_visits = 20_000
    counts = Counter(text_l(TAGS, replace(SHUFFLED, caption_variants=4), draw) for draw in visits(num_visits))
    assert len(counts) == 4
    assert all(abs(count - num_visits / 4) <= 4 * (num_visits * 3 / 16) ** 0.5 for count in counts.values())
    later = {
        text_l(TAGS, replace(SHUFFLED, caption_variants=4), DRAW._replace(epoch=9, occurrence=n)) for n in range(50)
    }
    assert later == set(counts)


def expanded_in_two_passes(text, chosen):
    """Wildcards as sd-scripts expands them: escapes to signs that the text lacks, then an expression, then back."""
    text = text.replace("{{", "⦅").replace("}}", "⦆")
    text = re.sub(r"\{([^}]+)\}", lambda match: match[1].split("|")[chosen % len(match[1].split("|"))], text)
    return text.replace("⦅", "{").replace("⦆", "}")


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(st.text(st.sampled_from("{{{}}}|a"), max_size=14), st.integers(0, 3))
def test_wildcards_are_read_as_in_two_passes(text, chosen):
    wildcards = split_wildcards(text)
    assert wildcards.filled([each[chosen % len(each)] for each in wildcards.options]) == expanded_in_two_passes(
        text, chosen
    )


# -- without chance ---------------------------------------------------------------------------------------------------


def test_without_chance_the_first_of_everything_is_used_whole():
    rules = PairRules(
        replace(EVERYTHING, caption_tag_dropout_rate=1.0, caption_variants=0),
        CaptionRules(shuffle_caption=True, caption_variants=5),
        CaptionDropout(caption_dropout_rate=1.0, caption_dropout_every_n_epochs=1),
    )
    captions = CaptionPair(("{a|b} c,d , e", "other"), ("x,y,z",))
    assert first_text(captions, rules, "l") == "style, a c, d, e"
    assert first_text(captions, rules, "g") == "x, y, z"
