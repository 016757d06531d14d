"""A run without training: what its first epochs would read, image by image, and what it all amounts to."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from library.captions.draws import Encoder
from library.captions.final_captions import FinalTexts, final_texts
from library.captions.limits import fitting_beginning
from library.captions.rules import PairRules
from library.config.atomic_files import replacing, write_text
from library.config.errors import UserError, listed
from library.data.caption_report import report_captions
from library.data.caption_summary import summarize
from library.data.caption_tokens import CaptionTokenizer, cut_captions, tokenizer_for
from library.data.captioning import Captioning
from library.data.epoch_order import MicroBatch
from library.data.folder_images import in_bucket
from library.data.found_images import FoundImage
from library.data.image_columns import FoundImages
from library.data.latent_cache import cache_bytes, read_fitting
from library.data.latents_of_set import cache_demands
from library.data.text_cache import FOLDER_NAME, tokens_digest
from library.data.training_columns import TrainingSet
from library.data.training_images import TrainingImage
from library.data.training_set import find_training_images
from library.runs.dry_run_facts import ImageFacts, ReadCaption, SetFacts, Visit
from library.runs.dry_run_page import page
from library.runs.dry_run_text import image_lines, set_lines
from library.sdxl.latents import vae_digest
from library.sdxl.model_source import load_vae
from library.training.goal import check_prediction
from library.training.preparation import make_order, num_steps_of, read_images, split_set
from library.training.progress import find_state
from library.training.run_options import TrainingOptions

log = logging.getLogger(__name__)

NUM_EPOCHS = 3
_SEED_IF_NONE = 0
_BEGINNING = b'{"key": "'
"""How a report in lines of JSON begins."""


def dry_run(options: TrainingOptions) -> int:
    """Show what the run would read and return 0; write the report of `--dry_run_report`. Raise as training would."""
    assert options.run.dry_run is not None
    if options.run.dry_run_report is not None:
        _require_own(options.run.dry_run_report)
    subsets = options.subsets()
    found, held_out = split_set(options, find_training_images(subsets))
    check_prediction(options)
    if options.resume.resume is not None and not options.hub.resume_from_huggingface:
        find_state(options.resume.resume, options.output_dir, options.save.output_name)
    cached = report_captions(
        options.training_set, subsets, found, trains_unet=options.trains_unet, trained=options.trained_encoders
    )
    source = options.model.vae or options.model.pretrained_model_name_or_path
    assert source is not None  # checked by problems()
    digest = vae_digest(load_vae(source, None))
    images = read_images(options.training_set, found, digest)
    tokens = tokenizer_for(images.used_subsets)
    seed = _SEED_IF_NONE if options.run.seed is None else options.run.seed
    preview = _Preview(options, found, images, tokens, seed, digest, cached)
    facts = preview.of_set()
    shown = list(preview.of_images(range(min(options.run.dry_run, len(images)))))
    for each in shown:
        log.info("\n".join(image_lines(each)))
    if held_out:
        log.info("held out for validation: %d images: %s", len(held_out), listed([image.key for image in held_out]))
    for line in (*set_lines(facts), *cut_captions(images, tokens)):
        log.info(line)
    if options.run.dry_run_report is not None:
        _write_report(options.run.dry_run_report, facts, shown, preview, len(images))
    return 0


def _require_own(path: Path) -> None:
    """Raise `UserError` where the report would replace lines of JSON of another kind, such as metadata."""
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return
    with path.open("rb") as file:
        beginning = file.read(len(_BEGINNING))
    if beginning not in (_BEGINNING, b""):
        raise UserError(
            f"--dry_run_report: '{path}' holds other lines than those of a dry run, and is not overwritten.",
            "Name another file.",
        )


def _write_report(path: Path, facts: SetFacts, shown: list[ImageFacts], preview: "_Preview", num_images: int) -> None:
    """Write every image as a line of JSON, or the images shown as a page."""
    if path.suffix.lower() in (".html", ".htm"):
        write_text(path, page(facts, shown))
    else:
        with replacing(path) as file:
            file.writelines(json.dumps(asdict(each)).encode() + b"\n" for each in preview.of_images(range(num_images)))
    log.info("wrote '%s'", path)


class _Preview:
    """The facts of a run before it: those of the whole set, and those of single images over the first epochs."""

    def __init__(
        self,
        options: TrainingOptions,
        found: FoundImages,
        images: TrainingSet,
        tokens: CaptionTokenizer,
        seed: int,
        vae_digest: str,
        cached: Sequence[Encoder],
    ):
        self._options = options
        self._found = found
        self._images = images
        self._tokens = tokens
        self._vae_digest = vae_digest
        self._cached = cached
        self._order = make_order(images, options.run, seed, num_processes=1, process_index=0)
        self._num_steps = num_steps_of(options.run, self._order)
        self._captioning = Captioning(tokens, seed, self._num_steps)
        self._seed = seed

    def of_set(self) -> SetFacts:
        """Return the totals, in one pass over the images."""
        options = self._options.training_set
        without = [image for image in self._images if not image.has_latents]
        bytes_of_latents = sum(
            cache_bytes(image.bucket, flip=image.subset.augmentation.flip_aug, masked=image.mask is not None)
            for image in without
        )
        source = Path(str(self._options.model.pretrained_model_name_or_path))
        return SetFacts(
            num_images=len(self._images),
            num_batches=self._order.num_batches,
            steps_per_epoch=self._order.steps_per_epoch,
            num_steps=self._num_steps,
            num_epochs=-(-self._num_steps // self._order.steps_per_epoch),
            seed=self._seed,
            is_seed_given=self._options.run.seed is not None,
            num_without_latents=len(without),
            latents_to_write=bytes_of_latents if options.cache_latents_to_disk else 0,
            bytes_of_model=source.stat().st_size if source.is_file() else None,
            captions=summarize(self._images, self._tokens, self._cached, self._seed),
            dropout=self._images[0].subset.captions.dropout,
        )

    def of_images(self, indices: range) -> Iterator[ImageFacts]:
        """Yield the facts of some images."""
        visits = self._visits(indices)
        for index in indices:
            image, found = self._images[index], in_bucket(self._found[index])
            file = found.file
            resized = image.source.assignment.resized if image.source is not None else None
            yield ImageFacts(
                key=image.key,
                file=None if file is None else str(file),
                size=tuple(image.size),
                bucket=tuple(image.bucket),
                resized=None if resized is None else tuple(resized),
                crop=(image.crop.left, image.crop.top),
                latents=self._latents(image, found),
                visits=[self._visit(image, micro_batch, place) for micro_batch, place in visits[index]],
            )

    def _visits(self, indices: range) -> dict[int, list[tuple[MicroBatch, int]]]:
        """Return the first visit of each image in each of the first epochs."""
        visits: dict[int, list[tuple[MicroBatch, int]]] = {index: [] for index in indices}
        num_epochs = min(NUM_EPOCHS, -(-self._num_steps // self._order.steps_per_epoch))
        for epoch in range(num_epochs):
            self._order.start_at(epoch, steps_done=epoch * self._order.steps_per_epoch)
            for micro_batch in self._order:
                for place, (index, occurrence) in enumerate(
                    zip(micro_batch.indices, micro_batch.occurrences, strict=True)
                ):
                    if occurrence == 0 and index in visits:
                        visits[index].append((micro_batch, place))
        return visits

    def _visit(self, image: TrainingImage, micro_batch: MicroBatch, place: int) -> Visit:
        rules = image.subset.captions
        texts = final_texts(image.captions, rules, self._captioning.draw(image, micro_batch, place))
        return Visit(
            epoch=micro_batch.epoch,
            is_flipped=micro_batch.flips[place],
            caption_l=self._read(texts, rules, "l"),
            caption_g=self._read(texts, rules, "g"),
        )

    def _read(self, texts: FinalTexts, rules: PairRules, encoder: Encoder) -> ReadCaption:
        own, text = rules.of(encoder), texts.of(encoder)
        num_tokens = self._tokens.num_tokens(text, own)
        kept = text
        if num_tokens > own.max_token_length:
            kept = fitting_beginning(
                text, own.max_token_length, lambda beginning: self._tokens.num_tokens(beginning, own)
            )
        return ReadCaption(
            text=kept,
            cut=text[len(kept) :],
            is_dropped=texts.is_dropped(encoder),
            num_tokens=num_tokens,
            limit=own.max_token_length,
            cache=self._cache_state(text, rules, encoder),
        )

    def _cache_state(self, text: str, rules: PairRules, encoder: Encoder) -> str:
        if encoder not in self._cached:
            return "each step"
        options = self._options.training_set
        if not options.cache_text_encoder_outputs_to_disk:
            return "cached at the start"
        ids = torch.tensor(self._tokens.read(text, rules.of(encoder), encoder).ids)
        folder = options.folder / FOLDER_NAME
        return "cached" if any(folder.glob(f"{encoder}-*/{tokens_digest(ids)}.safetensors")) else "missing"

    def _latents(self, image: TrainingImage, found: FoundImage) -> str:
        if image.has_latents:
            return "fit"
        if found.in_shards:
            return "are stale: the shards hold others"
        if not found.cache.is_file():
            return "are missing"
        if image.subset.augmentation.changes_pixels:
            return "have no use: pixels change at every visit"
        try:
            read_fitting(found.cache, found.file, found.bucket, cache_demands(found, self._vae_digest))
        except UserError as error:
            return f"are stale: {error.problem}"
        return "fit"
