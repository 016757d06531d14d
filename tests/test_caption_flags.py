"""A flag of captions trains what the same change of the captions themselves trains, bit for bit, on the tiny SDXL."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import PreparedSet, Run

pytestmark = (
    pytest.mark.slow
)  # two runs for each; tests/data/test_captioning.py compares the same texts without training

Train = Callable[..., Run]
Rewritten = Callable[[Callable[[str, str], tuple[str | list[str], str | list[str]]]], str]


@pytest.fixture(scope="module")
def rewritten(prepared_set: PreparedSet, tmp_path_factory: pytest.TempPathFactory) -> Rewritten:
    """`rewritten(change)` is the flag of metadata whose captions `change(L, G)` returns; buckets stay."""

    def write(change):
        entries = json.loads(prepared_set.latents_json.read_text(encoding="utf-8"))
        for entry in entries.values():
            entry["captionL"], entry["captionG"] = change(entry["captionL"], entry["captionG"])
        path: Path = tmp_path_factory.mktemp("metadata") / "meta_lat.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        return f"--in_json={path}"

    return write


def assert_equal(run: Run, other: Run) -> None:
    one, two = run.weights(), other.weights()
    assert one.keys() == two.keys()
    assert [name for name, weight in two.items() if not torch.equal(one[name], weight)] == []


def differ(run: Run, other: Run) -> bool:
    one, two = run.weights(), other.weights()
    return any(not torch.equal(one[name], weight) for name, weight in two.items())


SAME = [  # flags, and what they make of the captions of L and G
    pytest.param(
        ["--caption_prefix_l=zkfl style,", "--caption_suffix_g=at night"],
        lambda caption_l, caption_g: (f"zkfl style, {caption_l}", f"{caption_g} at night"),
        id="prefix of L, suffix of G",
    ),
    pytest.param(["--caption_dropout_rate=1"], lambda caption_l, caption_g: ("", ""), id="both dropped"),
    pytest.param(["--caption_dropout_rate_l=1"], lambda caption_l, caption_g: ("", caption_g), id="L dropped"),
    pytest.param(["--caption_dropout_rate_g=1"], lambda caption_l, caption_g: (caption_l, ""), id="G dropped"),
    pytest.param(
        ["--caption_tag_dropout_rate=1", "--keep_tokens=1"],
        lambda caption_l, caption_g: (caption_l.split(",")[0], caption_g.split(",")[0]),
        id="all tags dropped but the first",
    ),
    pytest.param(["--enable_wildcard"], lambda caption_l, caption_g: ([caption_l] * 3, [caption_g] * 2), id="lines"),
]


@pytest.mark.slow  # two runs each; tests/data/test_captioning.py compares the same texts without training
@pytest.mark.parametrize(("flags", "change"), SAME)
def test_a_flag_trains_what_captions_written_like_that_train(train: Train, rewritten: Rewritten, flags, change):
    if flags == ["--enable_wildcard"]:  # equal lines, of which one is drawn
        assert_equal(train(*flags, rewritten(change)), train())
    else:
        assert_equal(train(*flags), train(rewritten(change)))


ONE_STEP = ("--max_train_steps=1",)


def test_zeros_in_place_of_a_dropped_caption_are_not_the_encoding_of_an_empty_text(train: Train):
    empty = train(*ONE_STEP, "--caption_dropout_rate_l=1")
    zeros = train(*ONE_STEP, "--caption_dropout_rate_l=1", "--dropped_caption_l=zeros")
    other = train(*ONE_STEP, "--caption_dropout_rate_l=1", "--dropped_caption_g=zeros")
    assert differ(zeros, empty)
    assert_equal(other, empty)


def test_weights_in_captions_count_for_the_encoder_that_reads_them(train: Train, rewritten: Rewritten):
    weighted = rewritten(lambda caption_l, caption_g: (f"({caption_l}:1.5)", f"\\({caption_g}\\)"))
    plain = rewritten(lambda caption_l, caption_g: (caption_l, f"({caption_g})"))
    neutral = rewritten(lambda caption_l, caption_g: (f"({caption_l}:1.0)", f"\\({caption_g}\\)"))
    unweighted = train(*ONE_STEP, plain)
    assert_equal(train(*ONE_STEP, "--weighted_captions", neutral), unweighted)
    assert differ(train(*ONE_STEP, "--weighted_captions", weighted), unweighted)


def test_a_longer_g_leaves_a_short_l_as_it_is(train: Train, rewritten: Rewritten):
    long = rewritten(lambda caption_l, caption_g: (caption_l, ", ".join([caption_g] * 12)))
    for_g = train(*ONE_STEP, long, "--max_token_length_g=150")
    assert_equal(for_g, train(*ONE_STEP, long, "--max_token_length=150"))
    assert differ(for_g, train(*ONE_STEP, long))


CHANGING = ("--caption_dropout_rate=0.3", "--caption_dropout_rate_l=0.3", "--enable_wildcard_g", "--max_train_steps=4")


def test_captions_that_change_train_the_same_from_the_cache(train: Train, rewritten: Rewritten):
    variants = rewritten(lambda caption_l, caption_g: (caption_l, [caption_g, f"{{a|the}} picture of {caption_g}"]))
    cached = ("--cache_text_encoder_outputs_l", "--cache_text_encoder_outputs_g")
    assert_equal(train(variants, *CHANGING, *cached), train(variants, *CHANGING))


def test_drawn_variants_of_shuffled_tags_train_the_same_from_the_cache(train: Train):
    flags = ("--shuffle_caption", "--caption_variants=3")
    assert_equal(train(*flags, "--cache_text_encoder_outputs"), train(*flags))
