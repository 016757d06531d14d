"""The models of a rehearsal: of three sizes, without numbers."""

from dataclasses import asdict, replace

import torch

from benchmarks.rehearsal.books import Books
from benchmarks.timed_run import ARCHITECTURES
from library.sdxl.architecture import Architecture, SdxlModel, empty_model
from library.sdxl.checkpoint_file import ModelDtypes

_TINY, _TWO_LAYERS = ARCHITECTURES["tiny"], {"num_hidden_layers": 2}
MODELS = {
    **ARCHITECTURES,
    "small": replace(
        _TINY,
        unet=_TINY.unet | {"transformer_layers_per_block": [1, 1, 1]},
        text_encoder_l=_TINY.text_encoder_l | _TWO_LAYERS,
        text_encoder_g=_TINY.text_encoder_g | _TWO_LAYERS,
    ),
}
"""The tiny SDXL has the skeleton of the full size, and its counts; the small one has fewer transformer blocks."""


def model_without_numbers(architecture: Architecture, dtypes: ModelDtypes, books: Books) -> SdxlModel:
    """Return a model on the CPU that takes no memory and moves to the GPU as any other."""
    model = empty_model(architecture)
    for name, network in zip(
        asdict(dtypes), (model.unet, model.vae, model.text_encoder_l, model.text_encoder_g), strict=True
    ):
        dtype = getattr(dtypes, name) or torch.bfloat16
        with books.fake_mode:
            weights = {key: torch.empty(each.shape, dtype=dtype) for key, each in network.named_parameters()}
        network.load_state_dict(weights, strict=False, assign=True)
        network.eval()
    return model
