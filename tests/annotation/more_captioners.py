"""Tiny models of further kinds, each with its manner of being shown an image."""

from pathlib import Path

import torch
import transformers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GPT2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from tests.annotation.tiny_captioners import IMAGE_SIDE, PATCH, SMALL, saved, word_tokenizer

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
QWEN_CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|> <|image_pad|> <|vision_end|> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def write_qwen2_vl(folder: Path) -> Path:
    """A chat model whose images have as many tokens as they have pixels."""
    torch.manual_seed(0)
    names = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = word_tokenizer(
        [*SPECIAL, *names],
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    ids = tokenizer.convert_tokens_to_ids(names)
    text = {**SMALL, "vocab_size": len(tokenizer), "num_key_value_heads": 2, "initializer_range": 1.0}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1, "patch_size": PATCH}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=ids[0],
        vision_end_token_id=ids[1],
        image_token_id=ids[2],
        video_token_id=ids[3],
    )
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    images = transformers.Qwen2VLImageProcessor(patch_size=PATCH, size=size)
    videos = transformers.Qwen2VLVideoProcessor(patch_size=PATCH)
    processor = Qwen2VLProcessor(images, tokenizer, videos, chat_template=QWEN_CHAT)
    return saved(folder, Qwen2VLForConditionalGeneration(config), processor)


def write_florence2(folder: Path) -> Path:
    """An encoder and decoder that is asked by the name of a task."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer([*SPECIAL, "<image>"], image_token="<image>")
    text = {
        "model_type": "bart",
        "vocab_size": len(tokenizer),
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
        "init_std": 1.0,
    }
    vision = {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [8, 16],
        "num_heads": [2, 2],
        "num_groups": [2, 2],
        "window_size": 4,
        "projection_dim": 32,
    }
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=4)
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    images = CLIPImageProcessor(size=side, crop_size=side)
    images.image_seq_length = 17  # 4 x 4 cells and their mean
    return saved(folder, Florence2ForConditionalGeneration(config), Florence2Processor(images, tokenizer))


def write_vit_gpt2(folder: Path) -> Path:
    """An encoder of images and a decoder of text, which takes no other text."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(SPECIAL)
    vit = ViTConfig(**SMALL, image_size=IMAGE_SIDE, patch_size=PATCH)
    gpt2 = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64, initializer_range=1.0)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt2)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    model = VisionEncoderDecoderModel(config)
    model.generation_config.decoder_start_token_id = 1
    model.generation_config.eos_token_id = 2
    ViTImageProcessor(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}).save_pretrained(folder)
    return saved(folder, model, tokenizer)


def write_blip2(folder: Path) -> Path:
    """A model that is asked in plain text, and does not repeat it."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer([*SPECIAL, "<image>"])
    text = {
        "model_type": "opt",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "init_std": 1.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 128,
    }
    former = {**SMALL, "encoder_hidden_size": 32, "vocab_size": len(tokenizer)}
    vision = {**SMALL, "image_size": IMAGE_SIDE, "patch_size": PATCH}
    config = Blip2Config(
        text_config=text, qformer_config=former, vision_config=vision, num_query_tokens=4, image_token_index=4
    )
    images = BlipImageProcessor(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE})
    return saved(folder, Blip2ForConditionalGeneration(config), Blip2Processor(images, tokenizer, num_query_tokens=4))


KINDS = {
    "qwen2_vl": write_qwen2_vl,
    "florence2": write_florence2,
    "vision-encoder-decoder": write_vit_gpt2,
    "blip-2": write_blip2,
}
