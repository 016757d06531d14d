"""Batches: latents or pixels, both captions' tokens, sizes height first; the same from spawned workers."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.captions.draws import CaptionDraw
from library.config.errors import UserError
from library.config.options import problems_of
from library.data.caption_tokens import tokenizer_for
from library.data.captioning import Captioning
from library.data.dataset import Batch, CaptionedImages, make_loader
from library.data.epoch_order import BatchShape, EpochOrder
from library.data.latent_cache import CachedLatents, write_cache
from library.data.loader_options import LoaderOptions
from library.images.augmentation import Augmentation
from library.images.augmented import load_augmented
from library.images.buckets import BucketAssignment, BucketedImage
from library.images.crops import Crop
from library.images.reading import load_rgb
from library.images.resizing import resize_and_crop
from library.sdxl.sizes import Size
from library.sdxl.tokenizers import PAD_G, PAD_L, tokenize
from tests.training_images import captioned, image_of, micro_batch, rules_of_length, subset_of, with_rules

REPOSITORY = Path(__file__).parents[2]
# Neither square nor symmetric: shrunk to 97x48, where 8 columns go on the left and 9 on the right.
SIZE, RESIZED, BUCKET = Size(203, 100), Size(97, 48), Size(80, 48)
CROP = Crop(left=8, top=0, left_flipped=9)
CAPTIONS = [("photographic, studio portrait", "a tabby cat"), ("", "an espresso cup, 颐和园"), ("anime", "")]


def uncached(folder, name="a", captions=CAPTIONS[0]):
    """A training image that is encoded in the step; its picture is noise."""
    pixels = np.random.default_rng(list(name.encode())).integers(0, 256, (SIZE.height, SIZE.width, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}.png")
    picture = BucketedImage(folder / f"{name}.png", SIZE, BucketAssignment(BUCKET, RESIZED, 0.0))
    return image_of(name, *captions, SIZE, BUCKET, CROP, source=picture)


def cached(folder, name="a", captions=CAPTIONS[0], *, in_memory=False):
    """A training image with random latents, for both directions."""
    latents, flipped = np.random.default_rng(list(name.encode())).normal(size=(2, 4, 6, 10)).astype(np.float32)
    cache = CachedLatents(latents, SIZE, (8, 0, 88, 48), flipped)
    write_cache(folder / f"{name}.npz", cache)
    return image_of(name, *captions, SIZE, BUCKET, CROP, cache if in_memory else folder / f"{name}.npz")


def batch_of(images, flips=None, num_chunks=1):
    dataset = captioned(with_rules(images, rules_of_length(num_chunks)))
    return dataset[micro_batch(range(len(images)), flips, loss_scale=0.25)]


def same(first, second):
    """Whether two batches are equal, bit for bit."""
    flat = [
        [each for value in batch for each in (value if isinstance(value, tuple) else (value,))]
        for batch in (first, second)
    ]
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else (type(a), a) == (type(b), b)
        for a, b in zip(*flat, strict=True)
    )


# What a batch holds


@pytest.mark.parametrize("in_memory", [False, True])
def test_cached_pictures_come_as_the_latents_of_their_direction(tmp_path, in_memory):
    images = [cached(tmp_path, name, in_memory=in_memory) for name in "ab"]
    batch = batch_of(images, flips=[False, True])
    for sample, name, array in zip(batch.latents, "ab", ("latents", "latents_flipped"), strict=True):
        with np.load(tmp_path / f"{name}.npz") as file:
            np.testing.assert_array_equal(sample, file[array])
    assert (batch.latents.dtype, batch.pixels) == (torch.float32, None)


def test_uncached_pictures_come_as_pixels_resized_cropped_and_mirrored(tmp_path):
    image = uncached(tmp_path)
    plain, mirrored = batch_of([image, image], flips=[False, True]).pixels
    expected = resize_and_crop(load_rgb(image.source.path), RESIZED, BUCKET)
    assert plain.shape == (3, BUCKET.height, BUCKET.width)
    np.testing.assert_array_equal(((plain + 1) * 127.5).round().permute(1, 2, 0), expected)
    assert torch.equal(mirrored, plain.flip(-1))


def test_what_varies_in_a_picture_is_drawn_for_its_visit_alone(tmp_path):
    augmentation = Augmentation(color_aug=True, random_crop=True)
    images = [replace(uncached(tmp_path, name), subset=subset_of(augmentation=augmentation)) for name in "ab"]
    images[0] = replace(images[0], subset=subset_of(augmentation=replace(augmentation, color_aug=False)))
    dataset = captioned(images, seed=5)
    occurrences, flips = (0, 2, 1), (False, True, False)
    batch = dataset[micro_batch((0, 1, 0), flips, epoch=3, occurrences=occurrences)]
    for number, index in enumerate((0, 1, 0)):
        image = images[index]
        draw = CaptionDraw(5, 3, image.key, occurrences[number])
        pixels, crop, _ = load_augmented(image.source, image.subset.augmentation, draw)
        expected = pixels[:, ::-1] if flips[number] else pixels
        np.testing.assert_array_equal(((batch.pixels[number] + 1) * 127.5).round().permute(1, 2, 0), expected)
        left = crop.left_flipped if flips[number] else crop.left
        assert batch.crop_top_lefts[number].tolist() == [crop.top, left]
        alone = dataset[micro_batch((index,), flips[number : number + 1], epoch=3, occurrences=(occurrences[number],))]
        assert torch.equal(alone.pixels[0], batch.pixels[number])
    assert not torch.equal(batch.pixels[0], batch.pixels[2])


@pytest.mark.parametrize("make", [cached, uncached])
def test_sizes_are_height_first_and_the_crop_follows_the_direction(tmp_path, make):
    image = make(tmp_path)
    batch = batch_of([image, image], flips=[False, True])
    assert batch.original_sizes.tolist() == [[100, 203]] * 2
    assert batch.crop_top_lefts.tolist() == [[0, 8], [0, 9]]
    assert batch.target_sizes.tolist() == [[48, 80]] * 2
    assert {each.dtype for each in batch[3:6]} == {torch.float32}


def test_a_legacy_crop_keeps_its_fractions(tmp_path):
    image = replace(cached(tmp_path), crop=Crop(8.5, 0.25, 9.5))
    assert batch_of([image, image], flips=[True, False]).crop_top_lefts.tolist() == [[0.25, 9.5], [0.25, 8.5]]


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_each_encoder_gets_the_tokens_of_its_own_caption(tmp_path, num_chunks):
    batch = batch_of([cached(tmp_path, captions=captions) for captions in CAPTIONS], num_chunks=num_chunks)
    expected_l = [tokenize(caption_l, PAD_L, num_chunks).ids for caption_l, _ in CAPTIONS]
    expected_g = [tokenize(caption_g, PAD_G, num_chunks).ids for _, caption_g in CAPTIONS]
    assert batch.tokens.tokens_l.shape == (3, num_chunks, 77)
    assert (batch.tokens.tokens_l.tolist(), batch.tokens.tokens_g.tolist()) == (expected_l, expected_g)


def test_keys_scale_and_end_of_step_are_handed_on(tmp_path):
    batch = batch_of([cached(tmp_path, name) for name in "ab"])
    assert (batch.keys, batch.loss_scale, batch.completes_step) == (("a", "b"), 0.25, True)


def test_moving_a_batch_moves_every_tensor_and_nothing_else(tmp_path):
    batch = batch_of([cached(tmp_path)])
    moved = batch.to(torch.device("meta"))
    tensors = [moved.latents, *moved.tokens, moved.original_sizes, moved.crop_top_lefts, moved.target_sizes]
    assert {each.device.type for each in tensors} == {"meta"}
    assert moved[-3:] == batch[-3:]
    assert batch_of([uncached(tmp_path)]).to(torch.device("meta")).pixels.device.type == "meta"


def test_pictures_with_and_without_latents_are_of_different_kinds_and_so_are_buckets(tmp_path):
    images = [cached(tmp_path, "a"), uncached(tmp_path, "b"), cached(tmp_path, "c", in_memory=True)]
    images.append(replace(images[0], bucket=Size(48, 80)))
    with_latents, without, in_memory, other_bucket = [image.kind for image in images]
    assert with_latents == in_memory
    assert len({with_latents, without, other_bucket}) == 3


# The loader


def mixed_set(folder, *, swapped=False):
    """Images with latents and without; `swapped` has the tokens of other captions in the table."""
    makers = [cached, uncached, cached, cached, uncached, cached, uncached]
    images = [make(folder, str(index), CAPTIONS[index % 3]) for index, make in enumerate(makers)]
    images = with_rules(images, rules_of_length(2))
    tokens = tokenizer_for(image.subset for image in images)
    if swapped:
        tokens = replace(tokens, row_of=dict(zip(tokens.row_of, reversed(tokens.row_of.values()), strict=True)))
    return CaptionedImages(images, Captioning(tokens, seed=0, num_steps=100))


def loader_of(dataset, num_workers=0, **options):
    order = EpochOrder([image.kind for image in dataset.images], BatchShape(batch_size=2), seed=3, flip=True)
    loader_options = LoaderOptions(max_data_loader_n_workers=num_workers, **options)
    return order, make_loader(dataset, order, loader_options)


def test_the_loader_gives_the_batches_of_the_order_epoch_after_epoch(tmp_path):
    dataset = mixed_set(tmp_path)
    order, loader = loader_of(dataset)
    for epoch in (0, 1):
        order.start_at(epoch)
        batches = list(loader)
        assert len(batches) == len(loader) == order.num_batches
        assert all(same(batch, dataset[each]) for batch, each in zip(batches, order, strict=True))
    order.start_at(1, first_step=2, steps_done=2)
    assert all(same(rest, batch) for rest, batch in zip(loader, batches[2:], strict=True))


@pytest.mark.slow  # each worker imports torch
@pytest.mark.heavy
def test_spawned_workers_give_the_same_batches_in_each_epoch_that_they_live_through(tmp_path, monkeypatch):
    dataset = mixed_set(tmp_path, swapped=True)  # to tell tokens of the table from those of another tokenization
    monkeypatch.setattr(os, "cpu_count", lambda: 3)  # so many are needed for two workers
    order, loader = loader_of(dataset)
    parallel_order, parallel_loader = loader_of(dataset, num_workers=2, persistent_data_loader_workers=True)
    parallel_loader.loader.multiprocessing_context = "spawn"  # as on Windows
    assert (loader.loader.num_workers, parallel_loader.loader.num_workers) == (0, 2)
    for epoch in (0, 1):
        order.start_at(epoch)
        parallel_order.start_at(epoch)
        for batch, expected in zip(parallel_loader, loader, strict=True):
            assert type(batch) is Batch
            assert same(batch, expected)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_reading_batches_leaves_the_random_state_of_training_alone(tmp_path, num_workers):
    _, loader = loader_of(mixed_set(tmp_path), num_workers)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert len(list(loader)) == 4
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_picture_that_cannot_be_read_is_one_clear_line_from_a_worker_too(tmp_path, num_workers):
    dataset = mixed_set(tmp_path)
    for picture in tmp_path.glob("*.png"):
        picture.write_bytes(b"")
    with pytest.raises(UserError) as caught:
        list(loader_of(dataset, num_workers)[1])
    assert str(caught.value).startswith(f"'{tmp_path}")
    assert str(caught.value).endswith(".png' cannot be used: the file is empty. Replace the file or remove it.")


CRASH = """
import numpy as np

from library.images.crops import Crop
from library.data.dataset import make_loader
from library.data.epoch_order import BatchShape, EpochOrder
from library.data.latent_cache import CachedLatents
from library.data.loader_options import LoaderOptions
from library.sdxl.sizes import Size
from tests.training_images import captioned, image_of

size = Size(8, 8)
latents = CachedLatents(np.zeros((4, 1, 1), np.float32), size, (0, 0, 8, 8))
images = [image_of(str(index), "", "", size, size, Crop(0, 0, 0), latents) for index in range(20)]
order = EpochOrder([image.kind for image in images], BatchShape(), seed=0)
loader = make_loader(captioned(images), order, LoaderOptions(max_data_loader_n_workers=1))
batches = iter(loader)  # a name that lives until the very end, as those in the frames of a traceback do
next(batches)
raise RuntimeError("this run has crashed")
"""


@pytest.mark.heavy
def test_a_crash_ends_the_process_though_workers_ignore_what_ends_them():
    command = [sys.executable, "-c", CRASH]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (1, "RuntimeError: this run has crashed")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # this machine may have fewer cores
def test_no_more_workers_are_started_than_there_are_cores_for(tmp_path, monkeypatch):
    dataset = mixed_set(tmp_path)
    for num_cores, expected in ((1, 1), (4, 3), (64, 8)):
        monkeypatch.setattr(os, "cpu_count", lambda num_cores=num_cores: num_cores)
        assert loader_of(dataset, num_workers=8)[1].loader.num_workers == expected


def test_options_that_cannot_work_are_named():
    problems = problems_of(LoaderOptions(0, -1)), problems_of(LoaderOptions(1, 0, True))
    assert [[problem.split()[0] for problem in each] for each in problems] == [
        ["--train_batch_size", "--max_data_loader_n_workers"],
        ["--persistent_data_loader_workers"],
    ]
