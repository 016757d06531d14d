"""What frozen text encoders make of captions, computed once: L and G apart, each by its own token ids."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from library.config.atomic_files import require_disk_space
from library.config.digests import digest
from library.config.errors import UserError
from library.data.caption_tokens import TokenTable
from library.data.training_set import TrainingImage
from library.sdxl.tensor_file import TensorToWrite, open_tensors, raw_bytes, write_safetensors
from library.sdxl.text_encoding import EncodedText, encode_g, encode_l, text_encoder_digest
from library.sdxl.tokenizers import CHUNK_TOKENS, PAD_G, PAD_L, CaptionTokens

log = logging.getLogger(__name__)

FOLDER_NAME = "text_encoder_outputs"
"""The folder of `--cache_text_encoder_outputs_to_disk`, in that of the pictures."""

_TENSOR_NAMES = ("hidden", "pooled")
_BYTES_AROUND = 1000  # the header
_CAPTION_SHOWN = 60

Tensors = tuple[torch.Tensor, ...]
"""The outputs for one caption or, stacked, for several: L `hidden` [T, 768], G `hidden` [T, 1280] and
`pooled` [1280]."""


class OutputCache(Protocol):
    """The outputs of one encoder for every caption of the training set."""

    def of(self, tokens: torch.Tensor) -> Tensors:
        """Return the outputs for token ids [B, N, 77], stacked: the first axis of each tensor is B."""


@dataclass(frozen=True)
class CachedTexts:
    """The caches of both encoders; None for an encoder that works in every step."""

    outputs_l: OutputCache | None = None
    outputs_g: OutputCache | None = None

    def of(self, tokens: CaptionTokens) -> EncodedText:
        """Return what is cached of a batch of caption pairs."""
        hidden_l = hidden_g = pooled_g = None
        if self.outputs_l is not None:
            (hidden_l,) = self.outputs_l.of(tokens.tokens_l)
        if self.outputs_g is not None:
            hidden_g, pooled_g = self.outputs_g.of(tokens.tokens_g)
        return EncodedText(hidden_l, hidden_g, pooled_g)


NO_TEXTS = CachedTexts()


@dataclass(frozen=True)
class OutputsInMemory:
    """Rows of a few large tensors, which worker processes share instead of copying them."""

    row_of: Mapping[str, int]
    tensors: Tensors

    def of(self, tokens: torch.Tensor) -> Tensors:
        """As `OutputCache` says."""
        rows = [self.row_of[tokens_digest(ids)] for ids in tokens]
        return tuple(tensor[rows] for tensor in self.tensors)


@dataclass(frozen=True)
class OutputsOnDisk:
    """One file a caption, in a folder for each encoder, its weights and their precision.

    Nothing in it is ever replaced by something else, so that two runs with two models cannot disturb each other.
    """

    folder: Path
    encoder: str
    digest: str

    def of(self, tokens: torch.Tensor) -> Tensors:
        """As `OutputCache` says; raise `UserError` for a file that was removed or damaged since it was checked."""
        try:
            outputs = [self.read(tokens_digest(ids)) for ids in tokens]
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
        to_write = [TensorToWrite(name, tuple(tensor.shape), tensor.dtype, tensor.detach) for name, tensor in named]
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
    return _digest([ids])


def encode_texts(
    images: Iterable[TrainingImage],
    tokens: TokenTable,
    text_encoder_l: PreTrainedModel | None,
    text_encoder_g: PreTrainedModel | None,
    *,
    folder: Path | None,
) -> tuple[CachedTexts, list[str]]:
    """Return the outputs of the encoders (None: not cached) for all captions, and a sentence on each for the user.

    n different L captions and m different G captions cost n + m encodings, each by itself, so that nothing depends on
    which captions are there together; with a `folder` only those cost one whose file is not there, damaged or of
    something else. Raise `UserError` for a caption whose outputs are NaN or Inf.
    """
    captions = [(image.caption_l, image.caption_g) for image in images]
    outputs_l = outputs_g = None
    notes = []
    if text_encoder_l is not None:
        encoder_l = _Encoder("L", text_encoder_l, lambda tokens: (encode_l(text_encoder_l, tokens),))
        texts_l = _distinct((caption_l for caption_l, _ in captions), PAD_L, tokens)
        outputs_l, note = _cache(encoder_l, texts_l, folder)
        notes.append(note)
    if text_encoder_g is not None:
        encoder_g = _Encoder("G", text_encoder_g, lambda tokens: encode_g(text_encoder_g, tokens))
        texts_g = _distinct((caption_g for _, caption_g in captions), PAD_G, tokens)
        outputs_g, note = _cache(encoder_g, texts_g, folder)
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

    def bytes_of_a_caption(self, num_chunks: int) -> int:
        width = self.network.config.hidden_size
        num_numbers = (CHUNK_TOKENS * num_chunks + 2) * width + self.network.config.projection_dim
        return num_numbers * self.network.dtype.itemsize + _BYTES_AROUND


def _distinct(captions: Iterable[str], pad_token_id: int, tokens: TokenTable) -> dict[str, _Text]:
    """Return each text once, by the digest of its ids."""
    texts: dict[str, _Text] = {}
    for caption in dict.fromkeys(captions):
        (ids,) = tokens.chunks_of([caption], pad_token_id)
        texts.setdefault(tokens_digest(ids), _Text(caption, ids))
    return texts


def _cache(encoder: _Encoder, texts: dict[str, _Text], folder: Path | None) -> tuple[OutputCache, str]:
    if folder is None:
        return _into_memory(encoder, texts), f"{_counted(encoder, texts)}, encoded"
    digest = text_encoder_digest(encoder.network)
    precision = str(encoder.network.dtype).removeprefix("torch.")
    cache = OutputsOnDisk(folder / f"{encoder.name.lower()}-{digest[:16]}-{precision}", encoder.name, digest)
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
