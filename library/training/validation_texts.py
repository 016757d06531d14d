"""What the encoders are told of an image in validation: both captions, or without one, or those of another image."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from library.captions.draws import Encoder
from library.captions.rules import ZEROS, PairRules
from library.data.caption_tokens import CaptionTokenizer
from library.data.training_images import TrainingImage
from library.sdxl.prompt_weights import weighted_features
from library.sdxl.text_encoding import TextConditioning, encode_g, encode_l
from library.training.ablation import ABLATIONS, BOTH


class Text(NamedTuple):
    """A text as an encoder reads it: token ids [N, 77], weights of its places, and whether its outputs are zeros."""

    ids: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...] | None = None
    is_zero: bool = False


class Reading(NamedTuple):
    """What the U-Net is told of an image: the features of L and of G, and the pooled vector, each by its text."""

    text_l: Text
    text_g: Text
    pooled: Text


Readings = dict[str, list[Reading | None]]
"""For each condition what is read of each image; None where an image cannot have the condition."""


def readings_of(images: Sequence[TrainingImage], tokens: CaptionTokenizer, *, ablation: bool) -> Readings:
    """Return what is read of each image with both captions, and if `ablation` in the other conditions.

    Without a caption an encoder reads what training puts in the place of a dropped one. The other image is the next
    one whose caption differs; where there is none, the condition cannot be had.
    """
    own_l, own_g = ([_own(image, tokens, encoder) for image in images] for encoder in ("l", "g"))
    if not ablation:
        return {BOTH: [Reading(*pair, pair[1]) for pair in zip(own_l, own_g, strict=True)]}
    other_l, other_g = _next_different(own_l), _next_different(own_g)
    readings: Readings = {condition: [] for condition in (BOTH, *ABLATIONS)}
    for index, image in enumerate(images):
        text_l, text_g = own_l[index], own_g[index]
        none_l, none_g = _dropped(image, tokens, "l"), _dropped(image, tokens, "g")
        exchanged_l, exchanged_g = _of_the_other_encoder(image, tokens, "l"), _of_the_other_encoder(image, tokens, "g")
        next_l, next_g = other_l[index], other_g[index]
        read = {
            BOTH: Reading(text_l, text_g, text_g),
            "without_l": Reading(none_l, text_g, text_g),
            "without_g": Reading(text_l, none_g, none_g),
            "without_both": Reading(none_l, none_g, none_g),
            "other_l": None if next_l is None else Reading(next_l, text_g, text_g),
            "other_g": None if next_g is None else Reading(text_l, next_g, next_g),
            "exchanged": Reading(exchanged_l, exchanged_g, exchanged_g),
            "without_pooled": Reading(text_l, text_g, none_g),
        }
        for condition, reading in read.items():
            readings[condition].append(reading)
    return {condition: each for condition, each in readings.items() if any(each)}


def _own(image: TrainingImage, tokens: CaptionTokenizer, encoder: Encoder) -> Text:
    return _read(image.captions.of(encoder)[0], image.subset.captions, tokens, encoder, encoder)


def _of_the_other_encoder(image: TrainingImage, tokens: CaptionTokenizer, encoder: Encoder) -> Text:
    """Return the caption of the other encoder as `encoder` reads it."""
    other: Encoder = "g" if encoder == "l" else "l"
    return _read(image.captions.of(other)[0], image.subset.captions, tokens, other, encoder)


def _dropped(image: TrainingImage, tokens: CaptionTokenizer, encoder: Encoder) -> Text:
    rules = image.subset.captions
    empty = _read("", rules, tokens, encoder, encoder)
    return empty._replace(is_zero=rules.of(encoder).dropped_caption == ZEROS)


def _read(text: str, rules: PairRules, tokens: CaptionTokenizer, of: Encoder, by: Encoder) -> Text:
    """Return a caption of one encoder, with the rules of that, as it is read by one of them."""
    read = tokens.read(text, rules.of(of), by)
    weights = None if read.weights is None else tuple(read.weights)
    return Text(tuple(map(tuple, read.ids)), weights)


def _next_different(texts: Sequence[Text]) -> list[Text | None]:
    """Return for each text the next one, round the end of the list, that differs; None if all are alike."""
    if len(set(texts)) < 2:
        return [None] * len(texts)
    following: list[Text | None] = [None] * len(texts)
    for index in reversed(range(2 * len(texts))):  # twice: the last ones continue at the beginning
        here, after = index % len(texts), (index + 1) % len(texts)
        following[here] = texts[after] if texts[after] != texts[here] else following[after]
    return following


class Encodings:
    """The outputs of one encoder for texts, in host memory: each text is encoded once, and by itself.

    So nothing depends on which texts there are, nor on how many processes share the images.
    """

    def __init__(self, texts: Iterable[Text], encode: Callable[[nn.Module, torch.Tensor], tuple[torch.Tensor, ...]]):
        self._texts = list(dict.fromkeys(texts))
        self._encode = encode
        self._outputs: dict[Text, tuple[torch.Tensor, ...]] = {}

    @property
    def is_complete(self) -> bool:
        """Whether every text is encoded."""
        return len(self._outputs) == len(self._texts)

    @torch.no_grad()
    def encode(self, network: nn.Module, device: torch.device) -> None:
        """Encode every text, with the weights that `network` has now; it is on `device`."""
        for text in self._texts:
            ids = torch.tensor(text.ids, device=device)[None]  # [1, N, 77]
            hidden, *pooled = self._encode(network, ids)
            if text.weights is not None:
                hidden = weighted_features(hidden, torch.tensor([text.weights], device=device))
            outputs = (hidden, *pooled)
            self._outputs[text] = tuple((output * 0 if text.is_zero else output)[0].cpu() for output in outputs)

    def of(self, texts: Sequence[Text], output: int = 0) -> torch.Tensor:
        """Return hidden states [B, T, C], or with `output` 1 G's pooled vectors [B, 1280]."""
        return torch.stack([self._outputs[text][output] for text in texts])


def encodings_l(readings: Readings) -> Encodings:
    """Return the texts that L reads, not yet encoded."""
    return Encodings((each.text_l for each in _all(readings)), lambda network, ids: (encode_l(network, ids),))


def encodings_g(readings: Readings) -> Encodings:
    """Return the texts that G reads, not yet encoded."""
    return Encodings((text for each in _all(readings) for text in (each.text_g, each.pooled)), encode_g)


def conditioning(
    readings: Sequence[Reading], encoded_l: Encodings, encoded_g: Encodings, device: torch.device
) -> TextConditioning:
    """Return what the U-Net is told of B images, on `device`: as `encode_captions` returns it."""
    hidden_l = encoded_l.of([each.text_l for each in readings]).to(device)
    hidden_g = encoded_g.of([each.text_g for each in readings]).to(device)
    pooled = encoded_g.of([each.pooled for each in readings], output=1).to(device)
    return TextConditioning(torch.cat([hidden_l, hidden_g.to(hidden_l.dtype)], dim=-1), pooled)


def _all(readings: Readings) -> Iterable[Reading]:
    return (each for of_condition in readings.values() for each in of_condition if each is not None)
