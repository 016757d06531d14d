"""Muon for matrices, AdamW for every other weight, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) turns the momentum of a matrix into the nearest
orthogonal one and is defined for matrices alone. Both parts are those of torch.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

EMBEDDING = "is_embedding"
"""Attribute of a parameter: its rows are looked up, so that it is a table and no matrix."""

_OF_BOTH = ("lr", "weight_decay")
_OF_MUON = ("momentum", "nesterov", "ns_steps", "ns_coefficients", "adjust_lr_fn")
_OF_ADAMW = ("betas",)


class Muon(Optimizer):
    """Muon for weights of two dimensions and AdamW for all others, at the same learning rate and weight decay.

    Embeddings, by the attribute `EMBEDDING` of their parameters, are among the others, as torch recommends.

    With `adjust_lr_fn` "match_rms_adamw" (Liu et al. 2025, https://arxiv.org/abs/2502.16982) an update by Muon is as
    large as one by AdamW, so that a rate found for AdamW fits both; other values are those of `torch.optim.Muon`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        adjust_lr_fn: str = "match_rms_adamw",
        muon_eps: float = 1e-7,
        betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
    ):
        settings: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "adjust_lr_fn": adjust_lr_fn,
            "muon_eps": muon_eps,
            "betas": betas,
            "adamw_eps": adamw_eps,
        }
        super().__init__(params, settings)
        # Each on a weight that is never stepped: they are shown others, with the state of those, in every step.
        of_muon = {name: settings[name] for name in (*_OF_BOTH, *_OF_MUON)}
        self._muon = torch.optim.Muon([torch.nn.Parameter(torch.zeros(1, 1))], eps=muon_eps, **of_muon)
        of_adamw = {name: settings[name] for name in (*_OF_BOTH, *_OF_ADAMW)}
        self._adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], eps=adamw_eps, **of_adamw)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer, names, eps, is_of in (
            (self._muon, _OF_MUON, "muon_eps", _is_matrix),
            (self._adamw, _OF_ADAMW, "adamw_eps", _is_no_matrix),
        ):
            optimizer.state = self.state
            optimizer.param_groups = [
                {
                    **optimizer.defaults,
                    **{name: group[name] for name in (*_OF_BOTH, *names)},
                    "eps": group[eps],
                    "params": [parameter for parameter in group["params"] if is_of(parameter)],
                }
                for group in self.param_groups
            ]
            optimizer.step()
        return loss


def _is_matrix(parameter: torch.Tensor) -> bool:
    return parameter.ndim == 2 and not getattr(parameter, EMBEDDING, False)


def _is_no_matrix(parameter: torch.Tensor) -> bool:
    return not _is_matrix(parameter)
