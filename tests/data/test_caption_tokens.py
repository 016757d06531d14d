"""Tokens of captions: computed once for each text, shared with workers; captions that are cut are counted and named."""

import pickle

import pytest

from library.data import caption_tokens
from library.data.caption_rules import CaptionRules
from library.data.caption_tokens import ReadText, cut_captions, tokenize_captions_of, tokenize_texts
from library.data.crops import Crop
from library.data.training_set import TrainingImage
from library.sdxl.sizes import Size
from library.sdxl.tokenizers import PAD_G, PAD_L, tokenize, tokenize_captions
from tests.training_images import image_of, rules_of_length, with_rules

SIZES = (Size(64, 64), Size(64, 64), Crop(0, 0, 0))


def image(key: str, num_words_l: int, num_words_g: int) -> TrainingImage:
    return image_of(key, "cat " * num_words_l, "dog " * num_words_g, *SIZES)


def cut_sentences(images: list[TrainingImage], num_chunks: int) -> list[str]:
    images = with_rules(images, rules_of_length(num_chunks))
    return cut_captions(images, tokenize_captions_of(images))


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


# The table


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_the_table_has_the_tokens_of_the_tokenizer(num_chunks: int):
    texts = ["", "a tabby cat", "an espresso cup, 颐和园 🏯", "cat " * 100, "half \ud83c of a pair"]
    table = tokenize_texts(texts, num_chunks)
    expected = tokenize_captions(texts, texts, num_chunks)
    rules = rules_of_length(num_chunks).rules_l
    assert [table.read(text, rules, "l").ids for text in texts] == expected.tokens_l.tolist()
    assert [table.read(text, rules, "g").ids for text in texts] == expected.tokens_g.tolist()
    assert table.num_tokens("cat " * 100, rules) == 100


def test_each_text_is_tokenized_once_for_both_encoders(tokenized):
    images = [image_of(key, "same", "both", *SIZES) for key in "ab"] + [image_of("c", "both", "c", *SIZES)]
    table = tokenize_captions_of(images)
    for text in ("same", "both", "both", "c"):
        table.read(text, CaptionRules(), "l")
    cut_captions(images, table)
    assert tokenized == ["same", "both", "c"]


def test_a_text_outside_the_table_is_tokenized_when_asked_for(tokenized):
    table = tokenize_texts(["known"], num_chunks=1)
    for _ in range(2):
        read = table.read("drawn for this test", CaptionRules(), "l")
    assert read == ReadText(tokenize("drawn for this test", PAD_L, 1).ids, None, num_tokens=4)
    assert tokenized == ["known", "drawn for this test"]


def test_another_process_has_the_table_without_tokenizing(tokenized):
    table = pickle.loads(pickle.dumps(tokenize_texts(["a cat", "a dog"], num_chunks=1)))
    assert table.read("a dog", CaptionRules(), "g").ids == tokenize("a dog", PAD_G, 1).ids
    assert tokenized == ["a cat", "a dog"]


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
