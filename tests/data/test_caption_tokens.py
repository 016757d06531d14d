"""Tokens of captions: computed once for each text, when it is met; captions that are cut are counted and named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.captions.rules import CaptionRules
from library.data import caption_tokens
from library.data.caption_tokens import CaptionTokenizer, ReadText, cannot_be_cut, cut_captions, tokenizer_for
from library.data.training_images import TrainingImage
from library.images.crops import Crop
from library.sdxl.sizes import Size
from library.sdxl.tokenizers import PAD_L, tokenize, tokenize_captions
from tests.training_images import image_of, rules_of_length, with_rules

SIZES = (Size(64, 64), Size(64, 64), Crop(0, 0, 0))


def image(key: str, num_words_l: int, num_words_g: int) -> TrainingImage:
    return image_of(key, "cat " * num_words_l, "dog " * num_words_g, *SIZES)


def cut_sentences(images: list[TrainingImage], num_chunks: int) -> list[str]:
    images = with_rules(images, rules_of_length(num_chunks))
    return cut_captions(images, tokenizer_for(image.subset for image in images))


@pytest.fixture
def tokenized(monkeypatch) -> list[str]:
    """The texts that are tokenized, call by call."""
    texts: list[str] = []
    original = caption_tokens.token_ids

    def counting(text: str) -> list[int]:
        texts.append(text)
        return original(text)

    monkeypatch.setattr(caption_tokens, "token_ids", counting)
    return texts


# Tokens


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_texts_have_the_tokens_of_the_tokenizer(num_chunks: int):
    texts = ["", "a tabby cat", "an espresso cup, 颐和园 🏯", "cat " * 100, "half \ud83c of a pair"]
    reader = CaptionTokenizer(num_chunks)
    expected = tokenize_captions(texts, texts, num_chunks)
    rules = rules_of_length(num_chunks).rules_l
    assert [reader.read(text, rules, "l").ids for text in texts] == expected.tokens_l.tolist()
    assert [reader.read(text, rules, "g").ids for text in texts] == expected.tokens_g.tolist()
    assert reader.num_tokens("cat " * 100, rules) == 100


def test_a_text_is_tokenized_when_it_is_first_met_and_once_for_both_encoders(tokenized):
    images = [image_of(key, "met first", "both", *SIZES) for key in "ab"] + [image_of("c", "both", "met last", *SIZES)]
    reader = tokenizer_for(each.subset for each in images)
    cut_captions(images, reader)
    assert tokenized == []  # short texts of ASCII fit, whatever their tokens are
    for text in ("met first", "both", "both", "met last"):
        read = reader.read(text, CaptionRules(), "l")
        reader.read(text, CaptionRules(), "g")
    assert read == ReadText(tokenize("met last", PAD_L, 1).ids, None, num_tokens=2)
    assert tokenized == ["met first", "both", "met last"]


@given(st.text(st.characters(max_codepoint=127), max_size=120))
def test_what_cannot_be_cut_has_no_more_tokens_than_the_limit(text):
    assert not cannot_be_cut(text, 60) or len(caption_tokens.token_ids(text)) <= 60


# What is cut


def test_captions_that_fit_are_not_worth_a_word():
    assert cut_sentences([image("a", 75, 0), image("b", 0, 75)], num_chunks=1) == []


def test_each_encoder_has_its_own_count_with_the_longest_captions_first():
    images = [image("a", 80, 10), image("b", 1, 76), image("c", 1, 200), image("d", 0, 90), image("e", 0, 77)]
    assert cut_sentences(images, num_chunks=1) == [
        "1 of 5 L captions are longer than 75 tokens and are cut: a (80). Shorten them, or set --max_token_length=150.",
        "4 of 5 G captions are longer than 75 tokens and are cut: c (200), d (90), e (77), b (76). "
        "Shorten them, or set --max_token_length=225.",
    ]


@pytest.mark.parametrize(
    ("num_words", "num_chunks", "remedy"),
    [
        (151, 2, "Shorten them, or set --max_token_length=225."),
        (300, 1, "Shorten them, or set --max_token_length=225."),
        (300, 3, "Shorten them."),
    ],
)
def test_the_remedy_is_a_flag_only_where_one_helps(num_words: int, num_chunks: int, remedy: str):
    [sentence] = cut_sentences([image("a", num_words, 0)], num_chunks)
    assert sentence.endswith(f": a ({num_words}). {remedy}")
