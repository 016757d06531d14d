"""Captions that are cut are counted and named, each encoder's by itself."""

import pytest

from library.data.caption_lengths import cut_captions
from library.data.crops import Crop
from library.data.training_set import TrainingImage
from library.sdxl.sizes import Size


def image(key: str, num_words_l: int, num_words_g: int) -> TrainingImage:
    captions = "cat " * num_words_l, "dog " * num_words_g
    return TrainingImage(key, *captions, Size(64, 64), Size(64, 64), Crop(0, 0, 0), latents=None)


def test_captions_that_fit_are_not_worth_a_word():
    assert cut_captions([image("a", 75, 0), image("b", 0, 75)], num_chunks=1) == []


def test_each_encoder_has_its_own_count_with_the_longest_captions_first():
    images = [image("a", 80, 10), image("b", 1, 76), image("c", 1, 200), image("d", 0, 90), image("e", 0, 77)]
    assert cut_captions(images, num_chunks=1) == [
        "1 of 5 L captions have more than 75 tokens and lose the rest: a (80). "
        "Shorten them, or give --max_token_length=150.",
        "4 of 5 G captions have more than 75 tokens and lose the rest: c (200), d (90), e (77) and 1 more. "
        "Shorten them, or give --max_token_length=225.",
    ]


@pytest.mark.parametrize(
    ("num_words", "num_chunks", "remedy"),
    [
        (151, 2, "Shorten them, or give --max_token_length=225."),
        (300, 1, "Shorten them, or give --max_token_length=225."),
        (300, 3, "Shorten them."),
    ],
)
def test_the_remedy_is_a_flag_only_where_one_helps(num_words: int, num_chunks: int, remedy: str):
    [sentence] = cut_captions([image("a", num_words, 0)], num_chunks)
    assert sentence.endswith(f": a ({num_words}). {remedy}")
