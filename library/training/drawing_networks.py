"""The networks of a finished model, as training holds and runs them, to draw with."""

import logging
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn

from library.samples.sampler import SamplingNetworks
from library.sdxl.checkpoint_file import ModelDtypes
from library.sdxl.model_source import ModelOptions, load_model, load_unet
from library.sdxl.prediction_options import AS_THE_MODEL_SAYS, PredictionOptions
from library.training.accelerator import make_accelerator
from library.training.failures import explained_out_of_memory
from library.training.offload import on_device, place_networks
from library.training.precision import PrecisionOptions, dtype_of

log = logging.getLogger(__name__)


def load_networks(
    source: ModelOptions,
    precision: str,
    *,
    holds_all_in_it: bool,
    zeros_l: bool = False,
    zeros_g: bool = False,
    prediction: PredictionOptions = AS_THE_MODEL_SAYS,
) -> SamplingNetworks:
    """Return the networks that `source` names, computing in `precision` (a value of `--mixed_precision`).

    The U-Net is on the device, the others come there while they are needed. Weights are held as the model has them, or
    in `precision` if `holds_all_in_it` or if that is float32.

    In the precision of its training a model draws the samples of its run, bit for bit, if it was saved as it was held.
    Text encoders trained in bfloat16 are the exception: training ran them under autocast, which their file does not
    say. Raise `UserError` as `load_model`.
    """
    accelerator = make_accelerator(PrecisionOptions(mixed_precision=precision), [], None)
    compute = dtype_of(precision)
    held = compute if holds_all_in_it or compute == torch.float32 else None
    vae = torch.float32 if source.no_half_vae else compute
    log.info("loading '%s'", source.pretrained_model_name_or_path)
    dtypes = ModelDtypes(unet=held, vae=vae, text_encoder_l=held, text_encoder_g=held)
    model = load_model(source, dtypes, prediction, with_unet=False)
    for network in model.networks:
        # As in the run: torch sums some products in another order where weights need no gradient.
        network.requires_grad_(network is model.unet)
    with explained_out_of_memory("while the model is loaded"):
        load_unet(source, model.unet, held, accelerator.device)
    place_networks(model.networks, needed_each_step=[model.unet], device=accelerator.device)
    return SamplingNetworks(
        accelerator.prepare_model(model.unet, evaluation_mode=True),
        model.vae,
        _as_trained(model.text_encoder_l, compute, accelerator),
        _as_trained(model.text_encoder_g, compute, accelerator),
        at_hand=partial(on_device, accelerator.device),
        zeros_l=zeros_l,
        zeros_g=zeros_g,
        prediction=model.prediction,
    )


def _as_trained(text_encoder: nn.Module, compute: torch.dtype, accelerator: Accelerator) -> nn.Module:
    """Return an encoder as training runs it: one held in float32 was trained, and runs under autocast."""
    held = next(text_encoder.parameters()).dtype
    if held == torch.float32 != compute:
        return accelerator.prepare_model(text_encoder, device_placement=False, evaluation_mode=True)
    return text_encoder.to(compute)
