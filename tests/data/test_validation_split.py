"""Which images are held out: a function of key and seed alone, and what is seen of them is left to no chance."""

from dataclasses import replace
from pathlib import Path

import pytest

from library.captions.draws import CaptionDraw
from library.captions.final_captions import CaptionPair, final_texts
from library.captions.rules import CaptionDropout, CaptionRules, PairRules
from library.config.errors import UserError
from library.data.columns import Texts
from library.data.folder_images import with_distinct_keys
from library.data.found_images import FoundImage
from library.data.validation_split import place, split_off
from library.images.augmentation import Augmentation
from tests.training_images import SUBSET, subset_of

HALF = replace(SUBSET, validation_split=0.5)


def found(keys, subset=HALF) -> list[FoundImage]:
    captions = CaptionPair(("old, red, tag",), ("a house",))
    return [FoundImage(str(key), captions, subset, None, None, Path(f"{key}.npz"), 1.0) for key in keys]


def keys(images) -> set[str]:
    return {image.key for image in images}


def test_about_the_fraction_that_is_asked_for_is_held_out():
    places = sorted(place(0, str(number)) for number in range(2000))
    assert 0 <= places[0] < places[-1] < 1
    assert max(abs(each - index / 2000) for index, each in enumerate(places)) < 0.04  # Kolmogorov-Smirnov, 1 in 300
    training, held_out = split_off(found(range(2000)))
    assert abs(len(held_out) - 1000) < 4 * 500**0.5
    assert len(training) + len(held_out) == 2000


def test_adding_images_and_raising_the_split_moves_none():
    few, more = split_off(found(range(50))), split_off(found(range(100)))
    assert keys(few.held_out) == keys(more.held_out) & {str(number) for number in range(50)}
    wider = split_off(found(range(50), replace(HALF, validation_split=0.7)))
    assert keys(few.held_out) < keys(wider.held_out)
    assert [image.key for image in wider.held_out][: len(few.held_out)] == [image.key for image in few.held_out]
    assert keys(split_off(found(range(50), replace(HALF, validation_seed=1))).held_out) != keys(few.held_out)


def test_an_image_of_two_subsets_stands_on_one_side():
    large = replace(HALF, key_prefix="768x768 photos/")
    both = with_distinct_keys([*found(range(40), replace(HALF, key_prefix="photos/")), *found(range(40), large)])
    held_out = keys(split_off(both).held_out)
    assert {key.removeprefix("768x768 ") for key in held_out if key.startswith("768")} == {
        key for key in held_out if not key.startswith("768")
    }
    assert len(held_out) > 10


def test_only_subsets_with_a_split_give_images_up_and_regularization_images_never_are():
    regular = found(["r1", "r2", "r3", "r4"], replace(HALF, is_reg=True, validation_split=1.0))
    whole = found(["v1", "v2"], replace(SUBSET, validation_split=1.0))
    split = split_off([*found(["a", "b"], SUBSET), *regular, *whole])
    assert keys(split.training) == {"a", "b", "r1", "r2", "r3", "r4"}
    assert keys(split.held_out) == {"v1", "v2"}
    assert split_off(found("abc", SUBSET)).held_out.keys == Texts.of([])


def test_what_is_held_out_looks_alike_at_every_visit():
    rules = CaptionRules(
        *("style,", ""), shuffle_caption=True, caption_tag_dropout_rate=0.9, enable_wildcard=True, max_token_length=150
    )
    subset = subset_of(
        PairRules(rules, CaptionRules(dropped_caption="zeros"), CaptionDropout(caption_dropout_rate=1.0)),
        validation_split=1.0,
        augmentation=Augmentation(flip_aug=True, color_aug=True, random_crop=True, resize_interpolation="area"),
    )
    [image] = split_off(found(["a"], subset), trains=False).held_out
    texts = {final_texts(image.captions, image.subset.captions, CaptionDraw(0, epoch, "a")) for epoch in range(9)}
    assert texts == {("style, old, red, tag", "a house", False, False)}
    assert image.subset.augmentation == Augmentation(resize_interpolation="area")
    assert image.subset.captions.rules_l.max_token_length == 150
    assert image.subset.captions.rules_g.dropped_caption == "zeros"


@pytest.mark.parametrize(("split", "lacking"), [(1.0, "train"), (0.0001, "validate")])
def test_a_split_that_leaves_a_side_empty_is_refused(split: float, lacking: str):
    with pytest.raises(UserError, match=f"split of {split:g} of 3 images leaves none to {lacking}") as refused:
        split_off(found("abc", replace(SUBSET, validation_split=split)))
    assert "--validation_seed" in refused.value.remedy


def test_an_image_that_is_trained_elsewhere_is_named(caplog):
    same = [
        image._replace(file=Path("a.png"))
        for image in (*found("a", replace(SUBSET, validation_split=1.0)), *found("b", SUBSET))
    ]
    split_off(same)
    assert "held out in one place and trained in another" in caplog.text
    assert "a.png" in caplog.text
