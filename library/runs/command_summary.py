"""What a command would train, before it is started: images, steps, captions, memory and disk, without a model."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from library.config.errors import UserError
from library.data.caption_report import captions_sentences, check_captions, encoders_to_cache, trained_sentence
from library.data.caption_summary import summarize
from library.data.caption_tokens import cut_captions, tokenizer_for
from library.data.image_columns import FoundImages
from library.data.subsets import Subset
from library.data.training_set import find_training_images
from library.runs.command_check import Command, arguments_for, options_from
from library.runs.dry_run_text import encoder_sentence
from library.sdxl.architecture import SDXL_BASE
from library.training.card_memory import GIB, CardMemory, largest_batch
from library.training.disk_space import num_saves
from library.training.preparation import make_order, num_steps_of, read_images, split_set
from library.training.run_options import TrainingOptions

_UNKNOWN_VAE = ""
_USUAL_FILE = 6_937_675_734
"""Bytes of a file of SDXL in 16 bits."""


def command_summary(command: Command) -> list[tuple[str, list[str]]]:
    """Return titles with their lines. Raise `UserError` for what the trainer would refuse of the set."""
    with arguments_for(command) as arguments:
        options = options_from(arguments, is_draft=True)
        return list(_summary(options))


def _summary(options: TrainingOptions) -> Iterator[tuple[str, list[str]]]:
    subsets = options.subsets()
    found, held_out = split_set(options, find_training_images(subsets))
    groups = FoundImages.of(found).captions_by_subset()
    cached, sentences = encoders_to_cache(options.training_set, subsets, options.trained_encoders)
    notices = check_captions(groups, cached)
    images = read_images(options.training_set, found, _UNKNOWN_VAE)
    tokens = tokenizer_for(image.subset for image in images)
    seed = options.run.seed or 0
    order = make_order(images, options.run, seed, num_processes=1, process_index=0)
    num_steps = num_steps_of(options.run, order)
    held = [f"{len(held_out)} held out for validation"] if held_out else []
    yield "Images", [f"{len(images)} in {order.num_batches} batches an epoch", *held]
    num_epochs = -(-num_steps // order.steps_per_epoch)
    yield "Steps", [f"{num_steps} in {num_epochs} epochs of {order.steps_per_epoch}"]
    is_trained = {f"trains_{name}": name in options.trained_encoders for name in ("l", "g")}
    yield "Trained", [trained_sentence(trains_unet=options.trains_unet, **is_trained), *sentences]
    captions = summarize(images, tokens, cached, seed)
    of_encoders = [f"L: {encoder_sentence(captions.encoder_l)}", f"G: {encoder_sentence(captions.encoder_g)}"]
    yield "Captions", [*captions_sentences(groups), *of_encoders, *cut_captions(images, tokens), *notices]
    yield "GPU memory", _memory(options, FoundImages.of(found), subsets)
    yield "Disk", _disk(options, num_steps, order.steps_per_epoch)


def _memory(options: TrainingOptions, found: FoundImages, subsets: Sequence[Subset]) -> list[str]:
    try:
        parts = CardMemory(SDXL_BASE, subsets).parts(options, largest_batch(options, found))
    except UserError as error:  # of an optimizer that is not installed
        return [str(error)]
    total = sum(parts.values()) / GIB
    return [
        f"about {total:.1f} GiB by arithmetic, for a model of SDXL's size; CUDA takes about 0.5 more",
        ", ".join(f"{name} {num_bytes / GIB:.1f}" for name, num_bytes in parts.items() if num_bytes >= 0.05 * GIB),
    ]


def _disk(options: TrainingOptions, num_steps: int, steps_per_epoch: int) -> list[str]:
    saves = options.save.for_epochs(-(-num_steps // steps_per_epoch))
    num_models, num_states = num_saves(saves, range(1, num_steps + 1), steps_per_epoch)
    source = Path(str(options.model.pretrained_model_name_or_path))
    model = source.stat().st_size if source.is_file() else _USUAL_FILE
    folder = next(path for path in (options.output_dir, *options.output_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    models = f"{num_models} models of about {model / GIB:.2f} GiB"
    states = f", and {num_states} states" if num_states else ""
    lines = [f"{models}{states}; {free / GIB:.1f} GiB are free"]
    if num_models * model > free:
        lines.append(f"the models alone take {num_models * model / GIB:.1f} GiB: they do not fit")
    return lines
