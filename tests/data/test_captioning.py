"""What the encoders read at each visit: the same whatever surrounds it, L and G apart, cached as uncached."""

import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from library.captions.rules import EMPTY, ZEROS, CaptionDropout, CaptionRules, PairRules
from library.data.caption_tokens import tokenizer_for
from library.data.captioning import Captioning
from library.data.dataset import CaptionedImages, make_loader
from library.data.epoch_order import BatchShape, EpochOrder
from library.data.latent_cache import CachedLatents
from library.data.loader_options import LoaderOptions
from library.data.text_cache import encode_texts
from library.data.training_images import TrainingImage
from library.images.crops import Crop
from library.sdxl.architecture import SdxlModel
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file
from library.sdxl.sizes import Size
from library.sdxl.text_encoding import TextConditioning, encode_captions
from tests.training_images import image_of, micro_batch, subset_of

SIZE = Size(64, 64)
TAGS = "1girl, {red|blue} hair, (smile:1.3), outdoors, tree\nsolo, [portrait], night"
SENTENCES = "A woman stands under a tree.\nSomebody (close:1.2) is {happy|sad}."
CAPTIONS = [(TAGS, SENTENCES), ("cat, dog", "A cat and a dog."), ("", "A cup of (coffee), {black|white}."), ("x", "")]

EVERYTHING = PairRules(
    CaptionRules(
        caption_prefix="style,",
        enable_wildcard=True,
        shuffle_caption=True,
        keep_tokens=1,
        caption_tag_dropout_rate=0.3,
        token_warmup_step=30,
        weighted_captions=True,
    ),
    CaptionRules(enable_wildcard=True, caption_suffix=", photograph", dropped_caption=ZEROS, max_token_length=150),
    CaptionDropout(0.1, 0.2, 0.2, caption_dropout_every_n_epochs_g=4),
)


def images_of(rules: PairRules) -> list[TrainingImage]:
    latents = CachedLatents(np.zeros((4, 8, 8), np.float32), SIZE, (0, 0, 64, 64))
    subset = subset_of(rules)
    return [
        image_of(str(index), *captions, SIZE, SIZE, Crop(0, 0, 0), latents, subset=subset)
        for index, captions in enumerate(CAPTIONS)
    ]


def dataset_of(rules: PairRules) -> CaptionedImages:
    images = images_of(rules)
    return CaptionedImages(images, Captioning(tokenizer_for(image.subset for image in images), seed=5, num_steps=40))


# -- the same texts whatever surrounds them ---------------------------------------------------------------------------


def texts_of_visits(
    rules: PairRules, shape: BatchShape, *, epochs=(0, 1, 2), first_step=0, num_workers=0, monkeypatch=None
) -> dict[tuple, list]:
    """The tokens and weights of each visit: image, epoch, and those of its repeats in the order of their tokens."""
    dataset = dataset_of(rules)
    visits: dict[tuple, list] = {}
    for process in range(shape.num_processes):
        own = BatchShape(shape.batch_size, shape.accumulation_steps, shape.num_processes, process)
        order = EpochOrder([image.kind for image in dataset.images], own, seed=5, num_repeats=2)
        loader = make_loader(dataset, order, LoaderOptions(max_data_loader_n_workers=num_workers))
        for epoch in epochs:
            order.start_at(epoch, first_step, steps_done=first_step)
            for batch in loader:
                if not batch.loss_scale:
                    continue
                for row, key in enumerate(batch.keys):
                    tensors = (*batch.tokens, *batch.weights)
                    facts = [None if each is None else each[row].tolist() for each in tensors]
                    plain = [fact if fact is not None else "ones" for fact in facts]
                    visits.setdefault((key, epoch), []).append(_without_ones(plain))
    return {visit: sorted(map(str, facts)) for visit, facts in visits.items()}


def _without_ones(facts: list) -> list:
    """A row of ones says what no row says: others of its batch have weights."""
    return ["ones" if str(fact) == "1.0" or set(str(fact)) <= set("[1.0, ]") else fact for fact in facts]


WITHOUT_WARMUP = PairRules(
    CaptionRules(**{**vars(EVERYTHING.rules_l), "token_warmup_step": 0.0}), EVERYTHING.rules_g, EVERYTHING.dropout
)


def test_texts_depend_neither_on_batches_nor_on_processes():
    # Warm-up alone may: it follows the optimizer steps, and a step holds more images in larger batches.
    expected = texts_of_visits(WITHOUT_WARMUP, BatchShape(1))
    assert len({str(facts) for facts in expected.values()}) > len(CAPTIONS)  # they vary over the epochs
    for shape in (BatchShape(4), BatchShape(3, accumulation_steps=2), BatchShape(1, num_processes=2)):
        assert texts_of_visits(WITHOUT_WARMUP, shape) == expected


@pytest.mark.heavy
def test_texts_do_not_depend_on_workers(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    expected = texts_of_visits(EVERYTHING, BatchShape(2), epochs=(0,))
    assert texts_of_visits(EVERYTHING, BatchShape(2), epochs=(0,), num_workers=2) == expected


def test_an_epoch_begun_in_the_middle_has_the_texts_of_the_rest():
    dataset = dataset_of(EVERYTHING)
    order = EpochOrder([image.kind for image in dataset.images], BatchShape(1), seed=5, num_repeats=2)
    order.start_at(2, steps_done=16)
    whole = [dataset[each] for each in order]
    order.start_at(2, 5, steps_done=21)
    rest = [dataset[each] for each in order]
    assert len(rest) == 3
    for batch, expected in zip(rest, whole[5:], strict=True):
        assert [None if a is None else a.tolist() for a in (*batch.tokens, *batch.weights)] == [
            None if b is None else b.tolist() for b in (*expected.tokens, *expected.weights)
        ]


# -- L and G apart ----------------------------------------------------------------------------------------------------

SETTINGS_OF_L: list[dict[str, object]] = [
    {"caption_prefix": "anime,"},
    {"caption_suffix": "grain"},
    {"enable_wildcard": True},
    {"shuffle_caption": True},
    {"caption_tag_dropout_rate": 0.5},
    {"token_warmup_step": 20.0},
    {"weighted_captions": True},
    {"caption_variants": 3, "shuffle_caption": True},
    {"secondary_separator": "{"},
]


@pytest.mark.parametrize("settings", SETTINGS_OF_L, ids=str)
def test_a_setting_of_l_changes_no_token_of_g_and_no_number_of_its_pooled_vector(settings: dict):
    dropout = CaptionDropout(0.1, 0.0, 0.2)
    rules_g = CaptionRules(enable_wildcard=True, shuffle_caption=True, weighted_captions=True, dropped_caption=ZEROS)
    plain = dataset_of(PairRules(CaptionRules(), rules_g, dropout))
    changed = dataset_of(PairRules(CaptionRules(**settings), rules_g, dropout))
    differs = False
    for epoch, steps_done in product(range(1, 6), (0, 7)):
        visit = micro_batch(range(len(CAPTIONS)), epoch=epoch, steps_done=steps_done)
        before, after = plain[visit], changed[visit]
        assert torch.equal(before.tokens.tokens_g, after.tokens.tokens_g)
        for name in ("hidden_g", "pooled_g"):
            one, other = getattr(before.weights, name), getattr(after.weights, name)
            assert (one is None and other is None) or torch.equal(one, other)
        differs |= not torch.equal(before.tokens.tokens_l, after.tokens.tokens_l) or after.weights.hidden_l is not None
    assert differs


# -- cached as uncached -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_sdxl: Path) -> SdxlModel:
    return read_single_file(tiny_sdxl, ModelDtypes())


def both_ways(dataset: CaptionedImages, cached: CaptionedImages, model: SdxlModel, **visit) -> list[TextConditioning]:
    """The conditioning of one visit by the encoders, and from the cache as far as that reaches."""
    one = micro_batch(**visit)
    batches = dataset[one], cached[one]
    with torch.no_grad():
        return [
            encode_captions(model.text_encoder_l, model.text_encoder_g, batch.tokens, batch.encoded, batch.weights)
            for batch in batches
        ]


ROWS = {
    "nothing": (CaptionRules(), CaptionRules()),
    "prefix, suffix, separator": (
        CaptionRules(caption_prefix="a", caption_suffix="b"),
        CaptionRules(secondary_separator="."),
    ),
    "lines and wildcards": (CaptionRules(enable_wildcard=True), CaptionRules(enable_wildcard=True)),
    "weights": (CaptionRules(weighted_captions=True), CaptionRules(weighted_captions=True, enable_wildcard=True)),
    "lengths": (CaptionRules(), CaptionRules(max_token_length=150)),
    "shuffled L": (CaptionRules(shuffle_caption=True), CaptionRules()),
    "variants": (
        CaptionRules(shuffle_caption=True, enable_wildcard=True, caption_tag_dropout_rate=0.3, caption_variants=4),
        CaptionRules(enable_wildcard=True),
    ),
    "dropped to zeros": (CaptionRules(dropped_caption=ZEROS), CaptionRules(dropped_caption=ZEROS)),
    "L to zeros, G to the empty text": (CaptionRules(dropped_caption=ZEROS), CaptionRules(dropped_caption=EMPTY)),
}


@pytest.mark.parametrize("on_disk", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["memory", "disk"])
@pytest.mark.parametrize("row", ROWS)
def test_cached_outputs_are_those_of_the_encoders_bit_for_bit(row: str, on_disk: bool, model: SdxlModel, tmp_path):
    dropout = CaptionDropout(0.2, 0.2, 0.2)
    images = images_of(PairRules(*ROWS[row], dropout))
    tokens = tokenizer_for(image.subset for image in images)
    encoders = None if row == "shuffled L" else model.text_encoder_l, model.text_encoder_g
    texts, _ = encode_texts(images, tokens, *encoders, seed=5, folder=tmp_path if on_disk else None)
    plain = CaptionedImages(images, Captioning(tokens, seed=5, num_steps=40))
    cached = CaptionedImages(images, Captioning(tokens, seed=5, num_steps=40, texts=texts))
    for epoch, index in product(range(1, 5), range(len(images))):
        expected, got = both_ways(plain, cached, model, indices=[index], epoch=epoch)
        assert torch.equal(got.hidden, expected.hidden)
        assert torch.equal(got.pooled, expected.pooled)


def test_a_caption_dropped_to_zeros_is_zero_features_of_its_encoder_alone(model: SdxlModel):
    rules = CaptionRules(dropped_caption=ZEROS)
    width_l = model.text_encoder_l.config.hidden_size
    for dropout, zero_l, zero_g in (
        (CaptionDropout(1.0), True, True),
        (CaptionDropout(0, 1.0), True, False),
        (CaptionDropout(0, 0, 1.0), False, True),
    ):
        dataset = dataset_of(PairRules(rules, rules, dropout))
        hidden, pooled = both_ways(dataset, dataset, model, indices=[1])[0]
        assert (not hidden[..., :width_l].any()) == zero_l
        assert (not hidden[..., width_l:].any()) == zero_g
        assert (not pooled.any()) == zero_g


def test_each_encoder_is_cut_at_its_own_length_and_filled_with_empty_chunks(model: SdxlModel):
    rules = PairRules(CaptionRules(), CaptionRules(max_token_length=150))
    subset = subset_of(rules)
    long = "cat " * 100
    image = image_of("a", long, long, SIZE, SIZE, Crop(0, 0, 0), subset=subset)
    tokens = tokenizer_for([image.subset])
    read_l = tokens.read(long, rules.rules_l, "l").ids
    read_g = tokens.read(long, rules.rules_g, "g").ids
    assert len(read_l) == len(read_g) == 2
    empty_l = tokens.read("", rules.rules_l, "l").ids
    assert read_l[1] == empty_l[0]  # the second chunk is that of an empty text
    assert read_g[1] != tokens.read("", rules.rules_g, "g").ids[0]
