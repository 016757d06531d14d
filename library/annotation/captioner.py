"""A model of transformers that writes a sentence about an image: BLIP, GIT, Florence-2, LLaVA, Qwen-VL and the like."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from library.annotation.caption_texts import column_of
from library.annotation.captioner_model import CaptionerModel, Manner
from library.annotation.pending_images import caption_file
from library.annotation.reading_ahead import Described
from library.annotation.refusals import caption_in, is_refusal
from library.annotation.sentence_options import CaptionerOptions, WordOptions
from library.annotation.word_draws import WordDraws
from library.config.errors import UserError
from library.data.metadata import CaptionColumn
from library.data.strict_json import read_utf8
from library.images.reading import load_rgb
from library.images.resizing import resize_and_crop
from library.sdxl.sizes import Size

log = logging.getLogger(__name__)

_TAGS = "{tags}"
_BEFORE_TAGS = "\nTags of the image: "
_DEFAULT_PROMPTS = {
    Manner.CHAT: "Describe this image in one or two sentences.",
    Manner.TASK: "<DETAILED_CAPTION>",
    Manner.QUESTION: "a photo of",
}


class Seen(NamedTuple):
    """An image as the model is shown it, with its prompt; `key` is what its draws depend on."""

    image: Image.Image
    prompt: str | None
    key: str


class Asked(NamedTuple):
    """A batch for the model: its inputs on the host, and the keys of the images."""

    inputs: Any
    keys: list[str]


class Captioner:
    """A model with what it is asked: what `reading_ahead` calls a machine.

    `without_text` counts the images beside which the file of `also_read` is missing.
    """

    batch_size: int | None = None

    def __init__(
        self,
        model: CaptionerModel,
        asked: CaptionerOptions,
        words: WordOptions,
        folder: Path,
        max_image_side: int,
    ):
        self._model = model
        self._words = words
        self._folder = folder
        self._max_image_side = max_image_side
        self._reads: CaptionColumn | None = None if asked.also_read is None else column_of(asked.also_read)
        self._prompt = asked.prompt or _DEFAULT_PROMPTS.get(model.manner)
        self.without_text: list[str] = []
        if asked.prompt and model.manner is Manner.IMAGE_ALONE:
            raise UserError(f"{model.kind} takes no text, and --prompt is set.", "Leave it off, or use another model.")
        if model.num_positions is not None and words.max_new_tokens >= model.num_positions:
            raise UserError(
                f"{model.kind} has room for {model.num_positions} tokens, and --max_new_tokens is "
                f"{words.max_new_tokens}.",
                "Set it lower: the prompt needs some of them.",
            )
        if self._reads is not None and model.manner not in (Manner.CHAT, Manner.QUESTION):
            raise UserError(
                f"{model.kind} cannot be handed other texts, as --also_read asks.",
                "Use a model that chats, such as LLaVA or Qwen-VL, or leave the flag off.",
            )

    def load(self, path: Path) -> Seen:
        """Return the image, upright and on white, no larger than it has to be. Raise `UserError`."""
        image = load_rgb(path)
        largest = max(image.size)
        if self._max_image_side and largest > self._max_image_side:
            scale = self._max_image_side / largest
            size = Size(*(max(1, round(side * scale)) for side in image.size))
            image = Image.fromarray(resize_and_crop(image, size, size, interpolation="lanczos"))
        key = path.relative_to(self._folder).as_posix()
        return Seen(image, self._prompt_for(path, key), key)

    def prepare(self, loaded: Sequence[Seen]) -> Asked:
        """Return the batch as the model's processor has it."""
        inputs = self._model.inputs([each.image for each in loaded], [each.prompt for each in loaded])
        return Asked(inputs, [each.key for each in loaded])

    def describe(self, prepared: Asked) -> list[Described]:
        """Return a caption for each image. Raise `UserError` if the GPU has not enough memory."""
        try:
            answers = self._model.answers(prepared.inputs, **self._settings(prepared.keys))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU is out of memory with {len(prepared.keys)} images at once ({str(error).partition('.')[0]}).",
                "Lower --batch_size or --max_image_side, or set --mixed_precision=bf16, and start again: what is "
                "written stays and is skipped.",
            ) from error
        return [
            Described(text, is_refusal=is_refusal(text), is_cut=answer.is_cut)
            for answer in answers
            for text in [caption_in(answer.text)]
        ]

    def _settings(self, keys: Sequence[str]) -> dict[str, Any]:
        words = self._words
        settings: dict[str, Any] = {
            "max_new_tokens": words.max_new_tokens,
            "min_new_tokens": words.min_new_tokens or None,
            "num_beams": words.num_beams,
            "repetition_penalty": words.repetition_penalty,
        }
        if words.do_sample:
            processors = LogitsProcessorList([TemperatureLogitsWarper(words.temperature)])
            if words.top_k:
                processors.append(TopKLogitsWarper(words.top_k))
            if words.top_p < 1:
                processors.append(TopPLogitsWarper(words.top_p))
            processors.append(WordDraws(words.seed, keys))
            settings["logits_processor"] = processors
        return settings

    def _prompt_for(self, path: Path, key: str) -> str | None:
        if self._reads is None or self._prompt is None:
            return self._prompt
        file = caption_file(path, self._reads.caption_extension)
        text = " ".join(read_utf8(file).split()) if file.is_file() else ""
        if not text:
            self.without_text.append(key)
        if _TAGS in self._prompt:
            return self._prompt.replace(_TAGS, text)
        return f"{self._prompt}{_BEFORE_TAGS}{text}" if text else self._prompt
