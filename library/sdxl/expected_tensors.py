"""Which tensors a file must hold, in which shapes, and what a file is that lacks them."""

from torch import nn

from library.config.errors import UserError, listed
from library.sdxl.foreign_weights import FLOATS, quantised, what_it_is
from library.sdxl.tensor_file import TensorReader
from library.sdxl.weight_names import PREFIX_VAE, StoredTensor


def require_tensors(reader: TensorReader, network: nn.Module, table: list[StoredTensor]) -> None:
    """Raise `UserError` unless the file has every tensor of `table`, as floats, in the shape that `network` expects."""
    missing = [stored.name for stored in table if stored.name not in reader.shapes]
    if missing:
        raise UserError(
            f"'{reader.path}' {what_it_is(reader)}: {len(missing)} tensors are missing, such as "
            f"{listed(missing, limit=5)}.",
            _remedy_for_missing(missing, table),
        )
    integers = sorted({reader.dtypes[stored.name] for stored in table} - FLOATS)
    if integers:
        raise quantised(str(reader.path), f"weights of type {listed(integers)}")
    expected = expected_shapes(network, table)
    misshapen = [
        f"{name} {list(reader.shapes[name])} for {list(shape)}"
        for name, shape in expected.items()
        if not _holds_the_same(reader.shapes[name], shape)
    ]
    if misshapen:
        raise UserError(
            f"'{reader.path}' is not the usual SDXL: {len(misshapen)} tensors differ in shape: "
            f"{listed(misshapen, limit=5)}.",
            "Inpainting, refiner and pruned models cannot be fine-tuned here: use an SDXL base checkpoint.",
        )


def _remedy_for_missing(missing: list[str], table: list[StoredTensor]) -> str:
    if len(missing) == len(table) and missing[0].startswith(PREFIX_VAE):
        return "It holds no VAE: train with --vae and a VAE file, and prepare latents with that file as the model."
    return "Use an SDXL checkpoint (the base model or one fine-tuned from it)."


def expected_shapes(network: nn.Module, table: list[StoredTensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of `table` in the file, by name."""
    parameters = network.state_dict()
    return {
        stored.name: tuple(stored.from_parameters([parameters[name] for name in stored.parameters]).shape)
        for stored in table
    }


def _holds_the_same(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return whether the shapes agree but for ones at the end: a linear layer may be stored as a 1x1 convolution."""
    num_axes = max(len(shape), len(expected))
    padded = [(*each, *(1,) * (num_axes - len(each))) for each in (shape, expected)]
    return padded[0] == padded[1]
