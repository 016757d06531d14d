"""Tiny models with random weights of the kinds that write captions, saved as their makers' folders are."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = ["a", "the", "photo", "of", "cat", "woman", "cup", "in", "on", "with", "red", "blue", "and", "table", "sky"]
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE_SIDE, PATCH = 32, 8


def write_blip(folder: Path) -> Path:
    """An image-to-text model that takes the beginning of the caption as its prompt."""
    torch.manual_seed(0)
    tokenizer = _bert_tokenizer(folder)
    text = {
        **SMALL,
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": 32,
        "bos_token_id": tokenizer.cls_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": 128,
        "initializer_range": 1.0,
    }
    vision = {**SMALL, "image_size": IMAGE_SIDE, "patch_size": PATCH, "initializer_range": 1.0}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=32, image_text_hidden_size=32)
    images = BlipImageProcessor(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE})
    return saved(folder, BlipForConditionalGeneration(config), BlipProcessor(images, tokenizer))


def write_git(folder: Path) -> Path:
    """Another one, whose prompt stands before the caption as plain tokens."""
    torch.manual_seed(0)
    tokenizer = _bert_tokenizer(folder)
    vision = {**SMALL, "image_size": IMAGE_SIDE, "patch_size": PATCH}
    config = GitConfig(
        vision_config=vision,
        **SMALL,
        vocab_size=len(tokenizer),
        initializer_range=1.0,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    side = {"shortest_edge": IMAGE_SIDE}
    images = CLIPImageProcessor(size=side, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE})
    return saved(folder, GitForCausalLM(config), GitProcessor(images, tokenizer))


def write_llava(folder: Path, always: str | None = None) -> Path:
    """A chat model; with `always` it says that one word, whatever it sees, or nothing for ""."""
    torch.manual_seed(0)
    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
    first = [] if always is None else ["<eos>" if always == "" else always]
    tokenizer = word_tokenizer([*first, *special], image_token="<image>")
    names = tokenizer.get_vocab()
    vision = CLIPVisionConfig(**SMALL, image_size=IMAGE_SIDE, patch_size=PATCH, projection_dim=32)
    text = LlamaConfig(
        **SMALL,
        vocab_size=len(names),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=1.0,
        max_position_embeddings=256,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>")
    )
    llava = LlavaForConditionalGeneration(config)
    if always is not None:
        torch.nn.init.zeros_(llava.lm_head.weight)  # all words are equally likely: the first of the vocabulary is said
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    )
    processor = LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", chat_template=CHAT
    )
    processor.num_additional_image_tokens = 1
    return saved(folder, llava, processor)


def word_tokenizer(first: list[str], **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; those of `first` have the first ids, and `special` are its other special tokens."""
    names = list(dict.fromkeys([*first, *WORDS, "ASSISTANT:", "Describe"]))
    model = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=special,
    )


def _bert_tokenizer(folder: Path) -> BertTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer(vocab={name: index for index, name in enumerate(names)})


def saved(folder: Path, model: torch.nn.Module, processor) -> Path:
    """Save a model as its maker's folder is."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
