"""Token ids against the recorded reference and against OpenCLIP's own tokenizer."""

import json
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from library.sdxl.tokenizers import (
    END_TOKEN,
    PAD_G,
    PAD_L,
    START_TOKEN,
    num_chunks_needed,
    tokenize,
    tokenize_captions,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tokens.json").read_text(encoding="utf-8"))
PADDING = {"L": PAD_L, "G": PAD_G}
NUM_CHUNKS = {"75": 1, "150": 2, "225": 3}
EXCLAMATION_FIRST = "!,!,!"
"""A caption that begins with token 0, "!" before another sign; 0 is also the id of G's padding."""


def recorded(num_tokens, encoder):
    """(caption, ids) of the reference."""
    return [(GOLDEN["captions"][int(index)], ids) for index, ids in GOLDEN["ids"][num_tokens][encoder].items()]


@pytest.mark.parametrize("num_tokens", NUM_CHUNKS)
@pytest.mark.parametrize("encoder", PADDING)
def test_ids_are_those_of_the_reference(num_tokens, encoder):
    cases = recorded(num_tokens, encoder)
    assert len(cases) == (42 if num_tokens == "75" else 9)
    for caption, ids in cases:
        if caption == EXCLAMATION_FIRST and encoder == "G" and num_tokens != "75":
            continue  # the next test
        assert tokenize(caption, PADDING[encoder], NUM_CHUNKS[num_tokens]).ids == ids, caption


@pytest.mark.parametrize("num_tokens", ["150", "225"])
def test_a_first_exclamation_mark_is_kept_where_the_reference_takes_it_for_padding(num_tokens):
    ours = tokenize(EXCLAMATION_FIRST, PAD_G, NUM_CHUNKS[num_tokens]).ids
    reference = dict(recorded(num_tokens, "G"))[EXCLAMATION_FIRST]
    assert ours[0][:7] == [START_TOKEN, 0, 11, 0, 11, 256, END_TOKEN]
    assert reference[0][1] == END_TOKEN
    reference[0][1] = 0
    assert ours == reference


@pytest.mark.parametrize(
    "caption",
    [
        "a photo of a cat",
        "Photographic, studio PORTRAIT; 85mm f/1.4, best quality!!!",
        "don't you're I'd've",
        "(a:1.5) [b] {c} <angle> C:\\path\\file_01.png",
        "  many \t blanks\nand lines ",
        "x &amp; y &lt;3",
        "café naïve Ångström ½ ﬁne",
        "日本語のキャプション ไทย مرحبا",
        "👩‍🚀 woman astronaut 🚀",
        "mojibake: cafÃ© â€œquoteâ€",
    ],
)
def test_words_are_split_as_in_openclips_own_tokenizer(caption):
    (ids,) = tokenize(caption, PAD_L, 1).ids
    assert ids[1 : ids.index(END_TOKEN)] == SimpleTokenizer().encode(caption)


@pytest.mark.parametrize(
    ("num_words", "num_chunks"), [(0, 1), (1, 1), (75, 1), (76, 2), (150, 2), (151, 3), (225, 3), (226, 4)]
)
def test_a_caption_needs_as_many_chunks_of_75_tokens_as_it_fills(num_words, num_chunks):
    assert num_chunks_needed("cat " * num_words) == num_chunks


@pytest.mark.parametrize(
    ("num_words", "num_chunks", "num_truncated"), [(0, 1, 0), (75, 1, 0), (80, 1, 5), (80, 2, 0), (200, 2, 50)]
)
def test_text_that_does_not_fit_is_cut_and_counted(num_words, num_chunks, num_truncated):
    cat = tokenize("cat", PAD_G, 1).ids[0][1]
    caption = tokenize("cat " * num_words, PAD_G, num_chunks)
    assert caption.num_truncated == num_truncated
    assert sum(chunk.count(cat) for chunk in caption.ids) == num_words - num_truncated
    assert all(len(chunk) == 77 and chunk[0] == START_TOKEN for chunk in caption.ids)


def test_each_encoder_gets_its_own_captions_with_its_own_padding():
    tokens = tokenize_captions(["anime", "photographic"], ["woman, portrait", "a cat"], num_chunks=2)
    assert tokens.tokens_l.shape == tokens.tokens_g.shape == (2, 2, 77)
    assert tokens.tokens_l.dtype == torch.int64
    assert tokens.tokens_l[1].tolist() == tokenize("photographic", PAD_L, 2).ids
    assert tokens.tokens_g[0].tolist() == tokenize("woman, portrait", PAD_G, 2).ids
    assert tokens.tokens_l[0, 0, -1] == END_TOKEN
    assert tokens.tokens_g[0, 0, -1] == 0
