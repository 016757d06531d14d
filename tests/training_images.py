"""Training images without files of metadata, and what a data set needs beside them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from library.captions.final_captions import CaptionPair, variants_of
from library.captions.options import CaptionOptions
from library.captions.rules import CaptionRules, PairRules
from library.data.caption_tokens import tokenizer_for
from library.data.captioning import Captioning
from library.data.dataset import CaptionedImages
from library.data.epoch_order import MicroBatch
from library.data.flag_subsets import subset_of_flags
from library.data.latents_of_set import Trust, read_training_set
from library.data.loader_options import LoaderOptions
from library.data.subsets import Subset
from library.data.text_cache import NO_TEXTS, CachedTexts
from library.data.training_columns import TrainingSet
from library.data.training_images import TrainingImage
from library.data.training_set import find_training_images
from library.data.training_set_options import TrainingSetOptions
from library.images.buckets import BucketRule
from library.images.crops import Crop
from library.sdxl.sizes import Size

RULE = BucketRule(Size(64, 64), 64, 64, 64, no_upscale=False)


def subset_of(rules: PairRules = PairRules(), **facts: Any) -> Subset:  # noqa: B008  (a value)
    """A subset whose folder and metadata nobody reads."""
    return Subset(Path("images"), Path("meta.json"), RULE, captions=rules, **facts)


SUBSET = subset_of()


def rules_of_length(num_chunks: int) -> PairRules:
    """Rules that change nothing and cut captions at a number of chunks."""
    rules = CaptionRules(max_token_length=75 * num_chunks)
    return PairRules(rules, rules)


def image_of(
    key: str, caption_l: str, caption_g: str, size: Size, bucket: Size, crop: Crop, *files: Any, **facts: Any
) -> TrainingImage:
    """A training image with the captions as metadata would have them."""
    captions = CaptionPair(variants_of(caption_l), variants_of(caption_g))
    return TrainingImage(key, captions, facts.pop("subset", SUBSET), size, bucket, crop, *files, **facts)


def captioned(
    images: Sequence[TrainingImage], *, seed: int = 0, num_steps: int = 100, texts: CachedTexts = NO_TEXTS
) -> CaptionedImages:
    """The data set of images."""
    return CaptionedImages(images, Captioning(tokenizer_for(image.subset for image in images), seed, num_steps, texts))


def with_rules(images: Sequence[TrainingImage], rules: PairRules) -> list[TrainingImage]:
    """The same images in a subset of other caption rules."""
    subset = subset_of(rules)
    return [replace(image, subset=subset) for image in images]


def micro_batch(
    indices: Sequence[int],
    flips: Sequence[bool] | None = None,
    *,
    epoch: int = 1,
    steps_done: int = 0,
    occurrences: Sequence[int] | None = None,
    loss_scale: float = 1.0,
) -> MicroBatch:
    """A micro-batch that completes its step."""
    none = (0,) * len(indices)
    return MicroBatch(
        tuple(indices),
        tuple(occurrences or none),
        tuple(flips or map(bool, none)),
        epoch,
        steps_done,
        loss_scale,
        completes_step=True,
    )


def read_set(options: TrainingSetOptions, rule: BucketRule, vae_digest: str) -> TrainingSet:
    """The training set of options, as the trainer reads it."""
    subset = subset_of_flags(options, LoaderOptions(), CaptionOptions(), rule)
    return read_training_set(
        find_training_images([subset]),
        vae_digest,
        trust=Trust(index=not options.check_latents, images=options.skip_cache_check, keeps_index=True),
        legacy_crop=options.legacy_crop_coords,
    )
