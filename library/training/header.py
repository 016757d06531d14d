"""The header of a saved model: what it is, and in `ss_` keys, as model managers show them, how it was trained."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path

from library.captions.draws import ENCODERS, Encoder
from library.captions.rules import PairRules, described_rules
from library.config.errors import UserError
from library.data.subsets import Subset
from library.data.training_columns import TrainingSet
from library.samples.picture_files import SAMPLE_FOLDER, newest_pictures
from library.sdxl.model_spec import NO_THUMBNAIL, model_spec
from library.sdxl.prediction import FLOW, VELOCITY, Prediction
from library.sdxl.tensor_file import open_tensors
from library.sdxl.thumbnail import thumbnail_of
from library.training.plan import Plan
from library.training.progress import Progress
from library.training.run_options import TrainingOptions
from library.training.saves import last_name

MOST_TAGS = 100
"""How many of the most frequent tags of each encoder a header names."""
LONGEST_TAG = 500
"""Characters of a tag that a header names; longer ones are cut there, since no program reads a header of 100 MB."""

_OPTIONS = {
    "batch_size_per_device": "train_batch_size",
    "optimizer": "optimizer_type",
    "debiased_estimation": "debiased_estimation_loss",
    **{
        name: name
        for name in (
            *("seed", "gradient_accumulation_steps", "mixed_precision", "full_bf16", "gradient_checkpointing"),
            *("lr_scheduler", "lr_warmup_steps", "max_grad_norm", "noise_offset", "adaptive_noise_scale"),
            *("multires_noise_iterations", "multires_noise_discount", "min_timestep", "max_timestep"),
            *("noise_offset_random_strength", "ip_noise_gamma", "ip_noise_gamma_random_strength", "min_snr_gamma"),
            *("loss_type", "huber_schedule", "huber_c", "huber_scale", "scale_v_pred_loss_like_noise_pred"),
            *("v_pred_like_loss", "loss_weighting", "timestep_sampling"),
            *("prior_loss_weight", "flip_aug", "color_aug", "random_crop", "num_processes", "resize_interpolation"),
            *("validation_split", "validation_seed", "validate_every_n_steps", "validate_every_n_epochs"),
            "max_validation_steps",
        )
    },
}
"""Keys of kohya's trainers, and the options whose values they have."""
_SHOWN_RULES = frozenset(f"caption_dropout_rate{suffix}" for suffix in ("", "_l", "_g"))
"""Rules of captions that are named even where they are those of a run without flags."""


def header_maker(
    options: TrainingOptions,
    subsets: Sequence[Subset],
    images: TrainingSet,
    plan: Plan,
    progress: Progress,
    prediction: Prediction,
) -> Callable[[], dict[str, str]]:
    """Return what makes the header of the model, which predicts `prediction`, as it is at `progress`.

    The header of the source and the user's thumbnail are read now: the files may be gone when the model is saved.
    """
    source = _header_of_source(options.model.pretrained_model_name_or_path)
    predicted = {
        "ss_v_parameterization": str(prediction.kind == VELOCITY),
        "ss_flow_matching": str(prediction.kind == FLOW),
        "ss_zero_terminal_snr": str(prediction.has_zero_terminal_snr),
    }
    notes = cache(lambda: dict(_notes(options, subsets, images, plan, progress)))  # a pass over the set
    wanted = options.model_spec.metadata_thumbnail
    own = None if wanted in (None, NO_THUMBNAIL) else thumbnail_of(wanted)

    def make() -> dict[str, str]:
        now = datetime.now().astimezone()
        spec = model_spec(
            options.model_spec,
            name=last_name(options.save.output_name),
            description=_description(options, subsets),
            resolution=options.resolution,
            timesteps=None if options.timesteps.trains_all_timesteps else options.timesteps.timestep_range,
            now=now,
            source=source,
            thumbnail=_newest_sample(options, progress) if wanted is None else own,
        )
        steps = {"ss_steps": str(progress.step), "ss_training_finished_at": str(now.timestamp())}
        return spec | notes() | predicted | steps

    return make


def _header_of_source(source: str | None) -> Mapping[str, str]:
    path = Path(str(source))
    if not path.is_file():
        return {}
    with open_tensors(path) as file:
        return dict(file.metadata)


def _description(options: TrainingOptions, subsets: Sequence[Subset]) -> str:
    captions = "one caption for both text encoders" if _one_caption(subsets) else "a caption for each text encoder"
    return f"Stable Diffusion XL, fine-tuned from {_base_name(options)} with {captions}."


def _one_caption(subsets: Iterable[Subset]) -> bool:
    return all(subset.one_caption for subset in subsets)


def _base_name(options: TrainingOptions) -> str:
    """Return the name of the source, without the folders it lies in."""
    source = str(options.model.pretrained_model_name_or_path)
    return Path(source).name if Path(source).exists() else source


def _newest_sample(options: TrainingOptions, progress: Progress) -> str | None:
    """Return the newest sample of the run that can be read, as a thumbnail."""
    folder = options.output_dir / SAMPLE_FOLDER
    for path in newest_pictures(folder, options.save.output_name, datetime.fromisoformat(progress.started)):
        try:
            return thumbnail_of(str(path))
        except UserError:  # damaged: the one before it
            continue
    return None


def _notes(
    options: TrainingOptions,
    subsets: Sequence[Subset],
    images: TrainingSet,
    plan: Plan,
    progress: Progress,
) -> Iterator[tuple[str, str]]:
    """Yield how the model is trained, but for the step that it is at."""
    yield "ss_base_model_version", "sdxl_base_v1-0"
    yield "ss_sd_model_name", _base_name(options)
    yield "ss_output_name", last_name(options.save.output_name)
    yield "ss_resolution", str(tuple(options.resolution))
    yield "ss_training_started_at", str(datetime.fromisoformat(progress.started).timestamp())
    yield "ss_num_train_images", str(plan.num_images)
    yield "ss_num_batches_per_epoch", str(plan.order.num_batches)
    yield "ss_num_epochs", str(plan.num_epochs)
    yield "ss_max_train_steps", str(plan.num_steps)
    rate = options.optimizer.learning_rate
    rate_l = _rate(options.optimizer.learning_rate_te1, rate, is_trained=options.trains_l)
    rate_g = _rate(options.optimizer.learning_rate_te2, rate, is_trained=options.trains_g)
    yield "ss_learning_rate", str(rate)
    yield "ss_unet_lr", str(rate)
    yield "ss_text_encoder_lr", str([rate_l, rate_g])
    yield "ss_learning_rate_te1", str(rate_l)
    yield "ss_learning_rate_te2", str(rate_g)
    for key, name in _OPTIONS.items():
        value = progress.setting.options.get(name, "None")
        if value != "None":
            yield f"ss_{key}", value
    yield "ss_masked_loss", str(any(subset.has_masks for subset in subsets))
    yield "ss_alpha_mask", str(any(subset.alpha_mask for subset in subsets))
    yield from _notes_on_captions(subsets, images)


def _rate(own: float | None, otherwise: float, *, is_trained: bool) -> float:
    return (otherwise if own is None else own) if is_trained else 0.0


def _notes_on_captions(subsets: Sequence[Subset], images: TrainingSet) -> Iterator[tuple[str, str]]:
    """Yield which captions each encoder reads, what changes them, and their most frequent tags."""
    yield "ss_one_caption", str(_one_caption(subsets))
    for encoder, source in caption_sources(subsets).items():
        yield f"ss_captions_{encoder}", source
    plain = described_rules(PairRules())
    described = [described_rules(subset.captions) for subset in subsets]
    for name, value in plain.items():
        values = [each[name] for each in described]
        if name in _SHOWN_RULES or set(values) != {value}:
            yield f"ss_{name}", _joined(values)
    tags = {encoder.upper(): _frequent_tags(images, encoder) for encoder in ENCODERS}
    yield "ss_tag_frequency", json.dumps(tags, ensure_ascii=False)


def caption_sources(subsets: Sequence[Subset]) -> dict[Encoder, str]:
    """Return where the captions of each encoder come from: metadata, or the endings of caption files."""
    return {encoder: _joined(_source_of(subset, encoder) for subset in subsets) for encoder in ENCODERS}


def _source_of(subset: Subset, encoder: Encoder) -> str:
    """Return where the captions of an encoder come from, without the folders on the way."""
    if subset.metadata_file is not None:
        return subset.metadata_file.name
    return f"*{subset.extension_l if encoder == 'l' else subset.extension_g}"


def _frequent_tags(images: TrainingSet, encoder: Encoder) -> dict[str, int]:
    count: Counter[str] = Counter()
    for text in images.first_texts(encoder):
        count.update(tag.strip()[:LONGEST_TAG] for tag in text.split(",") if tag.strip())
    return dict(count.most_common(MOST_TAGS))


def _joined(values: Iterable[str]) -> str:
    """Return the different values of the subsets, in their order."""
    return " | ".join(dict.fromkeys(values))
