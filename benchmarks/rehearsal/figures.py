"""The figures of a rehearsed run, out of its books: what is alive at the peak, launches, casts, products and copies."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.rehearsal.books import Books
from library.sdxl.architecture import SdxlModel
from library.training.card_memory import GIB
from library.training.learner import Learner


def names_of(books: Books, model: SdxlModel, learner: Learner) -> dict[int, str]:
    """Return the storages of weights, gradients and the optimizer's state by name."""
    networks = {"U-Net": model.unet, "VAE": model.vae, "L": model.text_encoder_l, "G": model.text_encoder_g}
    names: dict[int, str] = {}
    for label, network in networks.items():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.device.type == "cuda":
                names[books.number_of(tensor)] = label
            if tensor.grad is not None:
                names[books.number_of(tensor.grad)] = "gradients"
    for state in learner.optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.device.type == "cuda":
                names[books.number_of(value)] = "optimizer"
    return names


def snapshot(books: Books, names: Mapping[int, str]) -> dict[str, Any]:
    """Return what the books say of a step: memory at its peak and at rest, by these names of storages, and counts."""
    parts, peak = books.parts_at_peak(dict(names)), books.peak + books.graph_pool
    return {
        "peak_gib": round(peak / GIB, 3),
        "peak_mib": round(peak / 2**20, 1),
        "resting_gib": round(books.now / GIB, 3),
        "parts_at_peak_gib": {name: round(size / GIB, 3) for name, size in parts.most_common()},
        **counts(books),
    }


def counts(books: Books) -> dict[str, Any]:
    """Return what the books have counted, by phase."""
    return {
        "operations": {phase: counter.total() for phase, counter in books.operations.items()},
        "kernels": dict(books.kernels),
        "casts": dict(books.casts),
        "products": _flat(books.products),
        "waits": _flat(books.waits),
        "copies": _flat(books.copies),
        "copied_mib": {key: round(count / 2**20, 3) for key, count in _flat(books.copied_bytes).items()},
    }


def _flat(counted: Counter[tuple[str, str]]) -> dict[str, int]:
    return {f"{phase}: {what}": count for (phase, what), count in counted.items()}
