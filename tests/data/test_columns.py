"""Columns hold what lists would, share their memory with workers, and are taken apart and joined as lists are."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from library.captions.final_captions import CaptionPair
from library.data.columns import Captions, Texts, Variants, num_distinct
from library.data.found_images import FoundImage
from library.data.image_columns import FoundImages
from library.data.training_columns import TrainingSet
from library.images.crops import Crop
from library.sdxl.sizes import Size
from tests.training_images import SUBSET, image_of, subset_of

TEXTS = ["a", "", "é 🏯", "half \ud83c", "d" * 300, "a"]


@pytest.mark.parametrize("rows", [[], [0], [5, 2, 2, 1], [3, 4]], ids=str)
def test_texts_are_those_of_a_list(rows):
    texts = Texts.of(TEXTS)
    assert (list(texts), [texts[index] for index in range(-6, 6)]) == (TEXTS, TEXTS + TEXTS)
    taken = texts.take(np.array(rows, np.int64))
    assert list(taken) == [TEXTS[row] for row in rows]
    assert list(Texts.joined([texts, taken])) == TEXTS + [TEXTS[row] for row in rows]
    chosen = np.isin(np.arange(6), rows)
    assert list(texts.where(chosen)) == [text if row in rows else "" for row, text in enumerate(TEXTS)]
    assert list(Texts.same("é", 3)) == ["é"] * 3
    with pytest.raises(IndexError):
        texts[6]


@pytest.mark.parametrize("captions", [[("a",), ("b",), ("a",)], [("a",), ("b", "c"), ("a",)]], ids=["one", "several"])
def test_captions_of_one_line_or_several(captions):
    variants = Variants.of(captions)
    assert list(variants) == [variants[index] for index in range(3)] == captions
    assert (variants.num_different, variants.num_several) == (2, sum(len(each) > 1 for each in captions))
    assert list(Variants.joined([variants, variants.take(np.array([1]))])) == [*captions, captions[1]]
    of_keys = Captions.of({"x": CaptionPair(captions[1], ("g",))})
    assert (of_keys["x"], list(of_keys.items())) == (CaptionPair(captions[1], ("g",)), [("x", of_keys["x"])])


def test_found_images_keep_what_is_known_of_each():
    other = subset_of(num_repeats=2)
    images = [
        FoundImage("a", CaptionPair(("l",), ("g", "h")), SUBSET, Size(64, 96), Path("a.png"), Path("a.npz"), 0.5),
        FoundImage(
            "p b", CaptionPair(("m",), ("i",)), other, None, None, Path("b.npz"), 1.0, Size(5, 6), "b", Path("m.png")
        ),
    ]
    columns = FoundImages.of(images)
    assert list(columns)[1] == images[1]
    assert columns[0] == images[0]._replace(own_key="a")
    both = FoundImages.joined([columns, columns.take(np.array([1]))])
    assert [image.key for image in both] == ["a", "p b", "p b"]
    assert both.used_subsets == [SUBSET, other]
    assert [(subset, list(captions)) for subset, captions in both.captions_by_subset()] == [
        (SUBSET, ["a"]),
        (other, ["p b", "p b"]),
    ]


def test_a_pickled_set_is_in_shared_memory_once_and_has_the_same_images():
    images = [image_of(key, "l", "g", Size(64, 64), Size(64, 64), Crop(0, 0, 0)) for key in "ab"]
    training_set = TrainingSet.of(images)
    copies = [pickle.loads(pickle.dumps(training_set)) for _ in range(2)]
    assert all([image.key for image in each] == ["a", "b"] for each in copies)
    assert [image.captions for image in copies[0]] == [image.captions for image in images]
    before = training_set.texts["keys"].block.ctypes.data
    pickle.dumps(training_set)
    assert training_set.texts["keys"].block.ctypes.data == before
    assert all(shared.content.is_shared() for shared in training_set._shared.values())


def test_distinct_numbers_are_counted():
    for numbers in ([], [5], [5, 5], [-3, 2**62, -3, 0]):
        assert num_distinct(np.array(numbers, np.int64)) == len(set(numbers))
