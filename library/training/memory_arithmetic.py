"""The GPU memory of a run, by arithmetic: nothing is measured, and the model is taken to have SDXL's usual size."""

from collections.abc import Iterator

from library.optim.options import KAHAN
from library.training.run_options import TrainingOptions

UNET, ENCODER_L, ENCODER_G, VAE = 2_567_463_684, 123_060_480, 694_659_840, 83_653_863
"""Numbers of weights."""
_GIB = 2**30
_ACTIVATIONS, _ACTIVATIONS_OF_BLOCKS = 6.40 * _GIB, 0.82 * _GIB
"""Of an image of 1024 x 1024 in bfloat16: without gradient checkpointing, and with it."""
_LARGEST_GRADIENT = 0.05 * _GIB
_OFFLOADED = 0.42 * _GIB
_ADAFACTOR, _ADAFACTOR_FLAT = 0.91 * _GIB, 0.02 * _GIB
_PIXELS = 1024 * 1024
_VALUES_A_WEIGHT = {"lion": 1, "sgd": 0, "adamw": 2, "adam": 2}
_VALUES_IF_UNKNOWN = 2
_BYTES_OF_8_BIT = 2


def memory_parts(options: TrainingOptions, cached_encoders: str = "") -> Iterator[tuple[str, float]]:
    """Yield the parts of the memory that a step takes, and their bytes.

    `cached_encoders` are those that no step needs. Not counted: the context of CUDA, and what the allocator loses.
    """
    held = 2 if options.precision.full_bf16 else 4
    trained = {
        "U-Net": UNET * options.trains_unet,
        "L": ENCODER_L * options.trains_l,
        "G": ENCODER_G * options.trains_g,
    }
    num_trained = sum(trained.values())
    yield "U-Net", UNET * (held if options.trains_unet else 2)
    for name, count in (("L", ENCODER_L), ("G", ENCODER_G)):
        if name.lower() not in cached_encoders:
            yield f"text encoder {name}", count * (held if trained[name] else 2)
    if not options.training_set.caches_latents:
        yield "VAE", 2 * VAE
    fused = options.optimizer.fused_backward_pass
    yield "gradients", min(_LARGEST_GRADIENT, held * num_trained) if fused else held * num_trained
    yield "optimizer", _optimizer(options, num_trained, held)
    if options.precision.bf16_rounding == KAHAN:
        yield "compensation of rounding", 2 * num_trained
    size = options.resolution
    each = _ACTIVATIONS_OF_BLOCKS if options.run.gradient_checkpointing else _ACTIVATIONS
    width = 1 if options.precision.mixed_precision in ("bf16", "fp16") else 2
    pixels = size.width * size.height / _PIXELS
    yield "activations", each * width * pixels * options.loader.train_batch_size


def _optimizer(options: TrainingOptions, num_trained: int, held: int) -> float:
    name = options.optimizer.optimizer_type.rpartition(".")[2].lower()
    share = num_trained / UNET
    if "adafactor" in name:
        flat = "flatten_convolutions=true" in [each.lower() for each in options.optimizer.optimizer_args or []]
        return share * (_ADAFACTOR_FLAT if flat else _ADAFACTOR)
    if options.optimizer.offload_optimizer:
        return _OFFLOADED
    if "8bit" in name:
        return float(_BYTES_OF_8_BIT * num_trained)
    known = [values for kind, values in _VALUES_A_WEIGHT.items() if name.startswith(kind)]
    return float((known or [_VALUES_IF_UNKNOWN])[0] * held * num_trained)
