"""SDXL training written out with diffusers' and torch's parts alone, for runs of sdxl_train.py to be compared with."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from torch.nn.functional import mse_loss

from library.data.epoch_order import BatchShape, EpochOrder
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file
from library.sdxl.tokenizers import PAD_G, PAD_L, save_tokenizer
from library.sdxl.weight_names import unet_table
from tests.conftest import PreparedSet


class PlainTraining:
    """The model `start` in float32, and what a training on the prepared set asks of it."""

    def __init__(self, start: Path, prepared: PreparedSet, tokenizer_folder: Path):
        whole = torch.float32
        model = read_single_file(start, ModelDtypes(whole, whole, whole, whole))
        self.unet = model.unet
        self._prepared = prepared
        self._entries = json.loads(prepared.latents_json.read_text(encoding="utf-8"))
        self._pipeline = StableDiffusionXLPipeline(
            model.vae,
            model.text_encoder_l,
            model.text_encoder_g,
            save_tokenizer(tokenizer_folder / "tokenizer", PAD_L),
            save_tokenizer(tokenizer_folder / "tokenizer_2", PAD_G),
            model.unet,
            DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
            add_watermarker=False,
        )

    def batches(self, shape: BatchShape, seed: int) -> list[list[str]]:
        """The keys of each batch of the first epoch, for one process."""
        keys = list(self._entries)
        kinds = [tuple(entry["train_resolution"]) for entry in self._entries.values()]
        return [[keys[index] for index in batch.indices] for batch in EpochOrder(kinds, shape, seed=seed)]

    def loss(self, keys: Sequence[str], generator: torch.Generator) -> torch.Tensor:
        """The losses of a batch of pictures of one bucket, added up; noise and timesteps come from `generator`."""
        latents = torch.cat([self._latents(key) for key in keys])
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (len(keys),), generator=generator)
        with torch.no_grad():
            hidden, _, pooled, _ = self._pipeline.encode_prompt(
                prompt=[self._entries[key]["captionL"] for key in keys],
                prompt_2=[self._entries[key]["captionG"] for key in keys],
                do_classifier_free_guidance=False,
            )
        predicted = self.unet(
            self._pipeline.scheduler.add_noise(latents, noise, timesteps),
            timesteps,
            encoder_hidden_states=hidden,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.cat([self._sizes(key) for key in keys])},
        ).sample
        return mse_loss(predicted, noise) * len(keys)

    def weights(self) -> dict[str, torch.Tensor]:
        """The U-Net's weights by their names in a single file."""
        parameters = dict(self.unet.named_parameters())
        return {
            stored.name: stored.from_parameters([parameters[name].detach() for name in stored.parameters])
            for stored in unet_table(self.unet)
        }

    def _latents(self, key: str) -> torch.Tensor:
        with np.load(self._prepared.images / f"{key}.npz") as file:
            return torch.from_numpy(file["latents"])[None] * 0.13025

    def _sizes(self, key: str) -> torch.Tensor:
        """Original height and width, crop top and left, target height and width."""
        with np.load(self._prepared.images / f"{key}.npz") as file:
            (width, height), (left, top, *_) = file["original_size"], file["crop_ltrb"]
        bucket_width, bucket_height = self._entries[key]["train_resolution"]
        return torch.tensor([[height, width, top, left, bucket_height, bucket_width]], dtype=torch.float32)
