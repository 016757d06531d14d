"""Weights in captions against those that sd-scripts 2026 read, and what they do to features."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.config.errors import UserError
from library.sdxl.prompt_weights import tokenize_weighted, weighted_features, weighted_pieces
from library.sdxl.tokenizers import CHUNK_TOKENS, PAD_G, PAD_L, tokenize

CASES = json.loads((Path(__file__).parents[1] / "golden" / "prompt_weights.json").read_text(encoding="utf-8"))["cases"]
READABLE = [case for case in CASES if "error" not in case]
NUM_CHUNKS = {"75": 1, "225": 3}
PADDING = {"L": PAD_L, "G": PAD_G}


def shown(case):
    return case["text"][-25:]


def test_all_recorded_cases_are_here():
    assert len(CASES) == 31
    assert len(READABLE) == 30


@pytest.mark.parametrize("case", READABLE, ids=shown)
def test_pieces_and_their_weights_are_those_of_the_reference(case):
    assert [list(piece) for piece in weighted_pieces(case["text"])] == case["pieces"]


@pytest.mark.parametrize("num_tokens", NUM_CHUNKS)
@pytest.mark.parametrize("case", READABLE, ids=shown)
def test_tokens_and_their_weights_are_those_of_the_reference(case, num_tokens):
    recorded, num_chunks = case[num_tokens], NUM_CHUNKS[num_tokens]
    made = {encoder: tokenize_weighted(case["text"], PADDING[encoder], num_chunks) for encoder in PADDING}
    assert made["L"].ids == recorded["ids_L"]
    # The reference takes "!", token 0, for padding where it cuts G's chunks: there L's ids with G's padding are right.
    if not recorded.get("ids_G_fault"):
        assert made["G"].ids == recorded["ids_G"]
    for ids_l, ids_g in zip(made["L"].ids, made["G"].ids, strict=True):
        num_text = ids_g.index(PAD_L) + 1 if PAD_L in ids_g else len(ids_g)
        assert ids_l[:num_text] == ids_g[:num_text]
    for first_and_last in ((chunk[0], chunk[-1]) for chunk in recorded["weights"]):
        assert first_and_last == (1.0, 1.0)
    of_text = [weight for chunk in recorded["weights"] for weight in chunk[1:-1]]
    assert torch.equal(torch.tensor(made["L"].weights), torch.tensor([1.0, *of_text, 1.0]))
    assert made["G"].weights == made["L"].weights


def test_a_weight_that_is_no_number_is_named():
    (broken,) = (case["text"] for case in CASES if "error" in case)
    with pytest.raises(UserError, match=r"'1\.2\.3'"):
        weighted_pieces(broken)


def test_a_text_without_markup_has_the_tokens_that_it_has_without_weights():
    caption = "a photo of a cat: 1.2, naïve café"
    made = tokenize_weighted(caption, PAD_G, 1)
    assert made.ids == tokenize(caption, PAD_G, 1).ids
    assert set(made.weights) == {1.0}


def test_tokens_that_do_not_fit_are_counted():
    made = tokenize_weighted("(cat " * 80, PAD_L, 1)
    assert made.num_truncated == 5
    assert len(made.weights) == CHUNK_TOKENS + 2


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text(st.sampled_from(r"()[]\:.1a ,-"), max_size=24))
def test_any_text_is_read_or_refused_and_no_sign_but_markup_is_lost(text):
    try:
        pieces = weighted_pieces(text)
    except UserError:
        return
    assert pieces
    assert all(first[1] != second[1] for first, second in pairwise(pieces))
    said = "".join(piece for piece, _ in pieces)
    assert said.count("a") == text.count("a")
    assert said.count(",") == text.count(",")


def test_features_are_multiplied_position_by_position_in_their_own_precision():
    hidden = torch.randn(2, CHUNK_TOKENS + 2, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.stack(
        [torch.tensor(tokenize_weighted(text, PAD_L, 1).weights) for text in ("(cat:1.5) dog", "[cat]")]
    )
    weighted = weighted_features(hidden, weights)
    assert torch.equal(weighted[0, 1], hidden[0, 1] * 1.5)
    assert torch.equal(weighted[1, 1], hidden[1, 1] * torch.tensor(1 / 1.1))
    assert torch.equal(weighted[:, 2:], hidden[:, 2:])
    assert torch.equal(weighted[:, 0], hidden[:, 0])
    halved = weighted_features(hidden.bfloat16(), weights)
    assert halved.dtype == torch.bfloat16
    assert torch.equal(halved, (hidden.bfloat16().float() * weights[..., None]).bfloat16())


def test_weights_of_one_leave_features_bit_for_bit():
    hidden = torch.randn(1, CHUNK_TOKENS + 2, 4).half()
    assert torch.equal(weighted_features(hidden, torch.ones(1, CHUNK_TOKENS + 2)), hidden)
