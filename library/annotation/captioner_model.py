"""Opening a captioning model of transformers, and how each kind of them is shown an image and asked."""

import enum
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image

from library.config.errors import UserError, first_line

log = logging.getLogger(__name__)

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_CONTINUE = frozenset({"blip", "git"})
_TASK = frozenset({"florence2"})
_IMAGE_ALONE = frozenset({"vision-encoder-decoder"})


class Manner(enum.Enum):
    """How a kind of model takes a text beside an image."""

    CHAT = "a message with image and text, by the chat template of the model"
    TASK = "the name of a task"
    CONTINUE = "the beginning of the caption"
    QUESTION = "a text, which the answer does not repeat"
    IMAGE_ALONE = "no text"


class Answer(NamedTuple):
    """What a model said; `is_cut` if the limit of tokens ended it."""

    text: str
    is_cut: bool


class CaptionerModel:
    """A network with its processor, on a device."""

    def __init__(self, network: Any, processor: Any, device: torch.device):
        self._network = network
        self._processor = processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._device = device
        self.kind: str = network.config.model_type
        self.num_positions: int | None = getattr(network.config.get_text_config(), "max_position_embeddings", None)
        """Most tokens of prompt and answer together; None where there is no limit."""
        self.manner = manner_of(self.kind, has_template=bool(getattr(processor, "chat_template", None)))
        self._tokenizer.padding_side = "left"  # new words follow the prompt
        self._ends = _ids(network.generation_config.eos_token_id) | _ids(self._tokenizer.eos_token_id)
        self._ends |= _ids(getattr(self._tokenizer, "sep_token_id", None)) if self.manner is Manner.CONTINUE else set()
        self._pad = self._tokenizer.pad_token_id
        if self._pad is None:
            self._pad = min(self._ends, default=0)
            self._tokenizer.pad_token_id = self._pad
        network.generation_config.pad_token_id = self._pad

    def inputs(self, images: Sequence[Image.Image], prompts: Sequence[str | None]) -> Any:
        """Return what the network takes for a batch, on the host. Raise `UserError` for a prompt that it refuses."""
        try:
            if self.manner is Manner.CHAT:
                return self._chat_inputs(images, [prompt or "" for prompt in prompts])
            if self.manner is Manner.IMAGE_ALONE or not any(prompts):
                return self._processor(images=list(images), return_tensors="pt")
            if self.kind == "git":
                return self._git_inputs(images, [prompt or "" for prompt in prompts])
            return self._processor(images=list(images), text=list(prompts), padding=True, return_tensors="pt")
        except ValueError as error:
            raise UserError(f"{self.kind} cannot be asked {prompts[0]!r}: {error}", "Set another --prompt.") from error

    def answers(self, inputs: Any, **settings: Any) -> list[Answer]:
        """Return what the network says of each image of a batch; `settings` are those of `generate`."""
        moved = inputs.to(self._device)
        tensors = {
            name: value.to(self._network.dtype) if torch.is_floating_point(value) else value
            for name, value in moved.items()
            if torch.is_tensor(value) and not (name == "token_type_ids" and self.manner is Manner.CONTINUE)
        }
        with torch.inference_mode():
            ids = self._network.generate(**tensors, do_sample=False, **settings)
        asked = tensors.get("input_ids")
        if asked is not None and self.manner is not Manner.CONTINUE and torch.equal(ids[:, : asked.shape[1]], asked):
            ids = ids[:, asked.shape[1] :]  # an encoder and decoder returns the answer alone
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        endless = [bool(len(row)) and int(row[-1]) not in (self._ends | {self._pad}) for row in ids]
        return [Answer(text, is_cut) for text, is_cut in zip(texts, endless, strict=True)]

    def _chat_inputs(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Any:
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
            for image, prompt in zip(images, prompts, strict=True)
        ]
        return self._processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )

    def _git_inputs(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Any:
        """GIT reads its start token and the words, without an end behind them."""
        inputs = self._processor(
            images=list(images), text=list(prompts), add_special_tokens=False, padding=True, return_tensors="pt"
        )
        start = torch.full((len(images), 1), self._tokenizer.cls_token_id)
        inputs["input_ids"] = torch.cat([start, inputs["input_ids"]], 1)
        inputs["attention_mask"] = torch.cat([torch.ones_like(start), inputs["attention_mask"]], 1)
        return inputs


def manner_of(kind: str, *, has_template: bool) -> Manner:
    """Return how a kind of model (`model_type` of its configuration) takes a text."""
    if kind in _TASK:
        return Manner.TASK
    if kind in _CONTINUE:
        return Manner.CONTINUE
    if kind in _IMAGE_ALONE:
        return Manner.IMAGE_ALONE
    return Manner.CHAT if has_template else Manner.QUESTION


def open_captioner(name_or_path: str, mixed_precision: str) -> CaptionerModel:
    """Return the model of a folder, or of the hub.

    Raise `UserError` for one that is not there and cannot be fetched, and for one of another kind. Nothing that a model
    brings along as code is run.
    """
    is_local = Path(name_or_path).exists()
    if is_local and not (Path(name_or_path) / "config.json").is_file():
        raise UserError(
            f"'{name_or_path}' is no model of transformers: it has to be a folder with a config.json.",
            "Name the folder of the model, not a file of weights.",
        )
    device = _device()
    with _quiet(), _explained(name_or_path):
        config = transformers.AutoConfig.from_pretrained(name_or_path, local_files_only=is_local)
        _require_kind(config.model_type, name_or_path)
        processor = _processor(name_or_path, config.model_type, is_local=is_local)
        network = transformers.AutoModelForImageTextToText.from_pretrained(
            name_or_path, dtype=_DTYPES[mixed_precision], local_files_only=is_local
        )
        network.eval().to(device)
    _forget_sampling(network)
    opened = CaptionerModel(network, processor, device)
    log.info("captioner: '%s' (%s) on %s; it takes %s", name_or_path, opened.kind, device.type, opened.manner.value)
    return opened


def _processor(name: str, kind: str, *, is_local: bool) -> Any:
    if kind not in _IMAGE_ALONE:
        return transformers.AutoProcessor.from_pretrained(name, local_files_only=is_local)
    images = transformers.AutoImageProcessor.from_pretrained(name, local_files_only=is_local)
    images.tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=is_local)
    return images


def _require_kind(kind: str, name: str) -> None:
    known = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if kind not in known:
        raise UserError(
            f"'{name}' is a model of another kind ({kind}), which writes no text about images.",
            "Use one of those that do: blip, git, florence2, llava, llava_next, qwen2_vl, qwen2_5_vl, qwen3_vl ...",
        )


def _forget_sampling(network: Any) -> None:
    """Leave the choice of words to the flags: folders of models bring temperatures and limits along."""
    config = network.generation_config
    for name in ("temperature", "top_p", "top_k", "max_length", "max_new_tokens", "min_length", "length_penalty"):
        setattr(config, name, None)
    config.do_sample = False


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _ids(value: Any) -> set[int]:
    return set() if value is None else set(value) if isinstance(value, list | tuple) else {int(value)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice from the console."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    yield


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Within the block, say in one line what is wrong with the files of a model."""
    from huggingface_hub.errors import HFValidationError
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(
                f"the GPU has not enough memory for '{name}'.", "Set --mixed_precision=bf16, or use a smaller model."
            ) from error
        is_absent = not Path(name).exists()
        what = "is not on this machine and cannot be fetched" if is_absent else "cannot be opened"
        remedy = (
            "Check the name and the network, or name the folder of a model on this machine."
            if is_absent or isinstance(error, HFValidationError)
            else "Download or copy it again; it has to be a folder that transformers has saved."
        )
        raise UserError(f"the model '{name}' {what} ({first_line(error)}).", remedy) from error
