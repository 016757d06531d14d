"""What the encoders read at each visit of an image: final texts, their tokens and weights, and what is cached."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from library.captions.draws import CaptionDraw, Encoder
from library.captions.final_captions import FinalTexts, final_texts
from library.captions.rules import ZEROS
from library.data.caption_tokens import CaptionTokenizer, ReadText
from library.data.epoch_order import MicroBatch
from library.data.text_cache import NO_TEXTS, CachedTexts
from library.data.training_images import TrainingImage
from library.sdxl.text_encoding import EncodedText, TextWeights
from library.sdxl.tokenizers import CHUNK_TOKENS, CaptionTokens


class TextBatch(NamedTuple):
    """What the text encoders are told of B images; `encoded` holds what is cached, `tokens` are always set."""

    tokens: CaptionTokens
    weights: TextWeights
    encoded: EncodedText


@dataclass(frozen=True)
class Captioning:
    """The captions of a run of `num_steps` optimizer steps: `seed` decides what is drawn."""

    tokens: CaptionTokenizer
    seed: int
    num_steps: int
    texts: CachedTexts = NO_TEXTS

    def draw(self, image: TrainingImage, micro_batch: MicroBatch, place: int) -> CaptionDraw:
        """Return what the random numbers of an image depend on, which is at `place` in a micro-batch."""
        occurrence = micro_batch.occurrences[place]
        return CaptionDraw(self.seed, micro_batch.epoch, image.key, occurrence, micro_batch.steps_done, self.num_steps)

    def of(self, images: Sequence[TrainingImage], draws: Sequence[CaptionDraw]) -> TextBatch:
        """Return the inputs of the text encoders for the images of a micro-batch."""
        visits = zip(images, draws, strict=True)
        texts = [final_texts(image.captions, image.subset.captions, draw) for image, draw in visits]
        read_l, zeros_l = self._read(images, texts, "l")
        read_g, zeros_g = self._read(images, texts, "g")
        tokens = CaptionTokens(_ids(read_l), _ids(read_g))
        weights = TextWeights(
            self._position_weights(read_l, zeros_l),
            self._position_weights(read_g, zeros_g),
            torch.tensor([0.0 if zero else 1.0 for zero in zeros_g]) if any(zeros_g) else None,
        )
        return TextBatch(tokens, weights, self.texts.of(tokens, zeros_l, zeros_g))

    def _read(
        self, images: Sequence[TrainingImage], texts: Sequence[FinalTexts], encoder: Encoder
    ) -> tuple[list[ReadText], list[bool]]:
        """Return the texts of one encoder as it reads them, and which of them are dropped to zeros."""
        rules = [image.subset.captions.of(encoder) for image in images]
        read = [self.tokens.read(text.of(encoder), own, encoder) for text, own in zip(texts, rules, strict=True)]
        zeros = [
            text.is_dropped(encoder) and own.dropped_caption == ZEROS for text, own in zip(texts, rules, strict=True)
        ]
        return read, zeros

    def _position_weights(self, read: Sequence[ReadText], zeros: Sequence[bool]) -> torch.Tensor | None:
        """Return the weights [B, T], or None if all are 1."""
        if not any(zeros) and all(text.weights is None for text in read):
            return None
        num_positions = CHUNK_TOKENS * self.tokens.num_chunks + 2
        ones, none = [1.0] * num_positions, [0.0] * num_positions
        return torch.tensor([none if zero else text.weights or ones for text, zero in zip(read, zeros, strict=True)])


def _ids(read: Sequence[ReadText]) -> torch.Tensor:
    # NumPy takes a third of the time that torch.tensor takes for nested lists.
    return torch.from_numpy(np.array([text.ids for text in read], dtype=np.int64))
