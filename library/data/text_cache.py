"""What frozen text encoders make of captions, computed once: L and G apart, each by its own token ids."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from library.captions.draws import Encoder
from library.captions.listing import texts_to_encode
from library.captions.rules import CaptionRules
from library.config.atomic_files import require_disk_space
from library.config.digests import digest
from library.config.errors import UserError
from library.data.caption_tokens import CaptionTokenizer
from library.data.training_images import TrainingImage
from library.sdxl.tensor_file import TensorToWrite, open_tensors, raw_bytes, write_safetensors
from library.sdxl.text_encoding import EncodedText, encode_g, encode_l, text_encoder_digest
from library.sdxl.tokenizers import CHUNK_TOKENS, CaptionTokens

log = logging.getLogger(__name__)

FOLDER_NAME = "text_encoder_outputs"
"""The folder of `--cache_text_encoder_outputs_to_disk`, in that of the images."""

_TENSOR_NAMES = ("hidden", "pooled")
_BYTES_AROUND = 1000  # the header
_CAPTION_SHOWN = 60
_REMEMBERED_DIGESTS = 1 << 14  # in each worker, about 1 KB each

Tensors = tuple[torch.Tensor, ...]
"""The outputs for one caption or, stacked, for several: L `hidden` [T, 768], G `hidden` [T, 1280] and
`pooled` [1280]."""


class OutputCache(Protocol):
    """The outputs of one encoder for every text that it can meet in training."""

    def of(self, tokens: torch.Tensor, zeros: Sequence[bool]) -> Tensors:
        """Return the outputs for token ids [B, N, 77], stacked: the first axis of each tensor is B.

        They are zero where `zeros` says so, whatever the ids.
        """


@dataclass(frozen=True)
class CachedTexts:
    """The caches of both encoders; None for an encoder that works in every step."""

    outputs_l: OutputCache | None = None
    outputs_g: OutputCache | None = None

    def of(self, tokens: CaptionTokens, zeros_l: Sequence[bool], zeros_g: Sequence[bool]) -> EncodedText:
        """Return what is cached of a batch of caption pairs, zero for the captions that are dropped to zeros."""
        hidden_l = hidden_g = pooled_g = None
        if self.outputs_l is not None:
            (hidden_l,) = self.outputs_l.of(tokens.tokens_l, zeros_l)
        if self.outputs_g is not None:
            hidden_g, pooled_g = self.outputs_g.of(tokens.tokens_g, zeros_g)
        return EncodedText(hidden_l, hidden_g, pooled_g)


NO_TEXTS = CachedTexts()


@dataclass(frozen=True)
class OutputsInMemory:
    """Rows of a few large tensors, which worker processes share instead of copying them."""

    row_of: Mapping[str, int]
    tensors: Tensors

    def of(self, tokens: torch.Tensor, zeros: Sequence[bool]) -> Tensors:
        """As `OutputCache` says."""
        rows = [0 if zero else self.row_of[key] for key, zero in zip(_tokens_digests(tokens), zeros, strict=True)]
        chosen = torch.tensor(rows)
        # Whole rows are copied, which indexing does number by number.
        outputs = tuple(tensor.index_select(0, chosen) for tensor in self.tensors)
        if any(zeros):
            for output in outputs:
                output[torch.tensor(zeros)] = 0
        return outputs


@dataclass(frozen=True)
class OutputsOnDisk:
    """One file a caption, in a folder for each encoder, its weights and their precision.

    Nothing in it is ever replaced by something else, so that two runs with two models cannot disturb each other.
    `zeros` are the outputs for a caption that is dropped to zeros.
    """

    folder: Path
    encoder: str
    digest: str
    zeros: Tensors = ()

    def of(self, tokens: torch.Tensor, zeros: Sequence[bool]) -> Tensors:
        """As `OutputCache` says; raise `UserError` for a file that was removed or damaged since it was checked."""
        try:
            outputs = [
                self.zeros if zero else self.read(tokens_digest(ids)) for ids, zero in zip(tokens, zeros, strict=True)
            ]
        except UserError as error:
            raise UserError(error.problem, "Start the run again, or go on with --resume: it is made again.") from error
        return tuple(torch.stack(tensors) for tensors in zip(*outputs, strict=True))

    def read(self, key: str) -> Tensors:
        """Return the outputs for the ids of digest `key`; raise `UserError` unless the file is theirs and whole."""
        path = self.path(key)
        with open_tensors(path) as reader:
            tensors = tuple(reader.get(name) for name in _TENSOR_NAMES if name in reader.shapes)
            if reader.metadata != self._header(key, tensors):
                raise UserError(f"'{path}' is damaged, or does not hold what its name says.", "Delete it.")
        return tensors

    def write(self, key: str, tensors: Tensors) -> None:
        """Write the file of the ids of digest `key`; raise `UserError` where that is impossible."""
        named = zip(_TENSOR_NAMES, tensors, strict=False)
        to_write = [TensorToWrite.of(name, tensor) for name, tensor in named]
        write_safetensors(self.path(key), to_write, self._header(key, tensors))

    def path(self, key: str) -> Path:
        """Return the file of the ids of digest `key`."""
        return self.folder / f"{key}.safetensors"

    def _header(self, key: str, tensors: Tensors) -> dict[str, str]:
        """Return what a file says of itself: which encoder, which token ids, and a fingerprint of the numbers."""
        return {
            "encoder": self.encoder,
            "encoder_blake2b": self.digest,
            "tokens_blake2b": key,
            "outputs_blake2b": _digest(tensors),
        }


def tokens_digest(ids: torch.Tensor) -> str:
    """A fingerprint of token ids [N, 77]: all that an encoder knows of a caption, its number of chunks included."""
    return _tokens_digests(ids[None])[0]


def _tokens_digests(tokens: torch.Tensor) -> list[str]:
    """Return the fingerprints of token ids [B, N, 77]."""
    shape = tuple(tokens.shape[1:])
    return [_remembered_digest(shape, ids.tobytes()) for ids in tokens.numpy()]


@lru_cache(_REMEMBERED_DIGESTS)
def _remembered_digest(shape: tuple[int, ...], ids: bytes) -> str:
    return _digest([torch.frombuffer(bytearray(ids), dtype=torch.int64).reshape(shape)])


def encode_texts(
    images: Sequence[TrainingImage],
    tokens: CaptionTokenizer,
    text_encoder_l: PreTrainedModel | None,
    text_encoder_g: PreTrainedModel | None,
    *,
    seed: int,
    folder: Path | None,
) -> tuple[CachedTexts, list[str]]:
    """Return the outputs of the encoders (None: not cached) for all texts, and a sentence on each for the user.

    n different L texts and m different G texts cost n + m encodings, each by itself, so that nothing depends on which
    texts are there together; with a `folder` only those cost one whose file is not there, damaged or of something
    else. The texts are all that each encoder can meet in the run of `seed`, as `texts_to_encode` lists them. Raise
    `UserError` for a text whose outputs are NaN or Inf.
    """
    outputs_l = outputs_g = None
    notes = []
    if text_encoder_l is not None:
        encoder_l = _Encoder("L", text_encoder_l, lambda tokens: (encode_l(text_encoder_l, tokens),))
        outputs_l, note = _cache(encoder_l, texts_of(images, tokens, "l", seed), folder, tokens.num_chunks)
        notes.append(note)
    if text_encoder_g is not None:
        encoder_g = _Encoder("G", text_encoder_g, lambda tokens: encode_g(text_encoder_g, tokens))
        outputs_g, note = _cache(encoder_g, texts_of(images, tokens, "g", seed), folder, tokens.num_chunks)
        notes.append(note)
    return CachedTexts(outputs_l, outputs_g), notes


class _Text(NamedTuple):
    caption: str
    ids: torch.Tensor  # [N, 77]


@dataclass(frozen=True)
class _Encoder:
    name: str
    network: PreTrainedModel
    encode: Callable[[torch.Tensor], Tensors]  # token ids [1, N, 77] to tensors whose first axis is 1

    @torch.no_grad()
    def outputs(self, text: _Text) -> Tensors:
        tensors = tuple(tensor[0].cpu() for tensor in self.encode(text.ids[None].to(self.network.device)))
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise UserError(
                f"text encoder {self.name} returns NaN or Inf for the caption '{text.caption[:_CAPTION_SHOWN]}'.",
                "Train with --mixed_precision=bf16 or no, or give a sound model.",
            )
        return tensors

    def zeros(self, num_chunks: int) -> Tensors:
        """Return what replaces the outputs for a caption that is dropped to zeros."""
        config, dtype = self.network.config, self.network.dtype
        hidden = torch.zeros(CHUNK_TOKENS * num_chunks + 2, config.hidden_size, dtype=dtype)
        return (hidden,) if self.name == "L" else (hidden, torch.zeros(config.projection_dim, dtype=dtype))

    def bytes_of_a_caption(self, num_chunks: int) -> int:
        width = self.network.config.hidden_size
        num_numbers = (CHUNK_TOKENS * num_chunks + 2) * width + self.network.config.projection_dim
        return num_numbers * self.network.dtype.itemsize + _BYTES_AROUND


def texts_of(
    images: Sequence[TrainingImage], tokens: CaptionTokenizer, encoder: Encoder, seed: int
) -> dict[str, _Text]:
    """Return each text that `encoder` can meet once, by the digest of its ids."""
    limits: dict[tuple[str, int, bool], CaptionRules] = {}
    for image in images:
        rules = image.subset.captions
        own = rules.of(encoder)
        for text in texts_to_encode(image.captions, rules, encoder, seed=seed, key=image.key):
            limits.setdefault((text, own.max_token_length, own.weighted_captions), own)
    texts: dict[str, _Text] = {}
    for (text, _, _), own in limits.items():
        ids = torch.tensor(tokens.read(text, own, encoder).ids)
        texts.setdefault(tokens_digest(ids), _Text(text, ids))
    return texts


def _cache(encoder: _Encoder, texts: dict[str, _Text], folder: Path | None, num_chunks: int) -> tuple[OutputCache, str]:
    if folder is None:
        return _into_memory(encoder, texts), f"{_counted(encoder, texts)}, encoded"
    digest = text_encoder_digest(encoder.network)
    precision = str(encoder.network.dtype).removeprefix("torch.")
    name = f"{encoder.name.lower()}-{digest[:16]}-{precision}"
    cache = OutputsOnDisk(folder / name, encoder.name, digest, encoder.zeros(num_chunks))
    return cache, _onto_disk(encoder, texts, cache)


def _into_memory(encoder: _Encoder, texts: dict[str, _Text]) -> OutputsInMemory:
    tensors: Tensors = ()
    for row, text in enumerate(_shown(texts.values(), encoder)):
        outputs = encoder.outputs(text)
        tensors = tensors or tuple(output.new_empty(len(texts), *output.shape) for output in outputs)
        for tensor, output in zip(tensors, outputs, strict=True):
            tensor[row] = output
    return OutputsInMemory({key: row for row, key in enumerate(texts)}, tensors)


def _onto_disk(encoder: _Encoder, texts: dict[str, _Text], cache: OutputsOnDisk) -> str:
    """Encode what the folder does not hold; what the user is told about it."""
    missing, unusable = [], 0
    for key in texts:
        if not cache.path(key).exists():
            missing.append(key)
            continue
        try:
            cache.read(key)
        except UserError as error:
            log.warning("%s It is encoded again.", error.problem)
            missing.append(key)
            unusable += 1
    if missing:
        num_chunks = len(texts[missing[0]].ids)
        needed = len(missing) * encoder.bytes_of_a_caption(num_chunks)
        what = f"to write outputs of text encoder {encoder.name} for {len(missing)} captions"
        require_disk_space(cache.folder, needed, what)
    for key in _shown(missing, encoder):
        cache.write(key, encoder.outputs(texts[key]))
    again = f" ({unusable} of them again)" if unusable else ""
    found = len(texts) - len(missing)
    return f"{_counted(encoder, texts)}, {len(missing)} encoded{again}, {found} found in '{cache.folder}'"


def _counted(encoder: _Encoder, texts: dict[str, _Text]) -> str:
    return f"text encoder {encoder.name}: {len(texts)} different captions"


def _shown(items: Collection[Any], encoder: _Encoder) -> Iterable[Any]:
    quiet = None if items else True  # None: where there is no terminal
    return tqdm(items, f"encoding captions for {encoder.name}", unit="caption", disable=quiet)


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    described = ((f"{tensor.dtype} {list(tensor.shape)}".encode(), raw_bytes(tensor)) for tensor in tensors)
    return digest(part for pair in described for part in pair).hex()
