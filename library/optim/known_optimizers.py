"""The optimizers that have a name: where each comes from, and what its name implies."""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from library.config.errors import UserError
from library.optim.installed_classes import load_class, reason_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

FLAG = "--optimizer_type"
ADAFACTOR = "Adafactor"


@dataclass(frozen=True)
class OptimizerKind:
    """Where an optimizer comes from: module, class, package to install, and the arguments that kohya's name implies."""

    name: str
    module: str
    class_name: str
    package: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    one_rate: bool = False  # finds one learning rate by itself, for all parameter groups together

    def load(self) -> "type[Optimizer]":
        """Return the class. Raise `UserError` if its package is not installed, or cannot be imported."""
        from torch.optim import Optimizer

        found = self._load_known() if self in OPTIMIZERS else load_class(FLAG, self.name, Optimizer, "an optimizer")
        closure = inspect.signature(found.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            message = f"{FLAG} {self.name} computes the loss several times in a step, which is not supported."
            raise UserError(message, "Choose an optimizer whose step() needs no closure.")
        return found

    def _load_known(self) -> "type[Optimizer]":
        try:
            found: type[Optimizer] = getattr(importlib.import_module(self.module), self.class_name)
        except Exception as error:  # a package may raise anything
            is_old = isinstance(error, AttributeError)
            reason = f"has no {self.class_name}" if is_old else f"cannot be imported ({reason_of(error)})"
            install = f"python -m pip install {'--upgrade ' if is_old else ''}{self.package}"
            raise UserError(
                f"{FLAG} {self.name} needs '{self.package}', which {reason}.",
                f"Run: {install}" if is_old or isinstance(error, ImportError) else f"Choose another {FLAG}.",
            ) from error
        return found


NESTEROV = {"momentum": 0.9, "nesterov": True}
SCHEDULE_FREE = ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")
PRODIGY_PLUS = "ProdigyPlusScheduleFree"
BITSANDBYTES = (
    *("AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit", "PagedLion8bit"),
    *("AdEMAMix8bit", "PagedAdEMAMix", "PagedAdEMAMix8bit"),
)
DADAPTATION = ("DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD")
OWN_ROUNDING_OFF = {"stochastic_rounding": False}  # the stepper rounds, in a way that a resumed run repeats

# kohya's names, then others; one line for those of a package that need nothing but their name.
OPTIMIZERS = (
    OptimizerKind("AdamW", "torch.optim", "AdamW", "torch"),
    OptimizerKind("SGDNesterov", "torch.optim", "SGD", "torch", NESTEROV),
    OptimizerKind(ADAFACTOR, "library.optim.adafactor", "Adafactor", "torch"),
    *(OptimizerKind(name, "bitsandbytes.optim", name, "bitsandbytes") for name in BITSANDBYTES),
    OptimizerKind("SGDNesterov8bit", "bitsandbytes.optim", "SGD8bit", "bitsandbytes", NESTEROV),
    OptimizerKind("Lion", "lion_pytorch", "Lion", "lion-pytorch"),
    *(OptimizerKind(name, "schedulefree", name, "schedulefree") for name in SCHEDULE_FREE),
    OptimizerKind("Prodigy", "prodigyopt", "Prodigy", "prodigyopt", one_rate=True),
    *(OptimizerKind(name, "dadaptation", name, "dadaptation", one_rate=True) for name in DADAPTATION),
    OptimizerKind("DAdaptation", "dadaptation.experimental", "DAdaptAdamPreprint", "dadaptation", one_rate=True),
    OptimizerKind("DAdaptAdamPreprint", "dadaptation.experimental", "DAdaptAdamPreprint", "dadaptation", one_rate=True),
    OptimizerKind("DAdaptAdanIP", "dadaptation.experimental", "DAdaptAdanIP", "dadaptation", one_rate=True),
    OptimizerKind("Muon", "library.optim.muon", "Muon", "torch"),
    OptimizerKind("CAME", "pytorch_optimizer", "CAME", "pytorch-optimizer"),
    OptimizerKind("AdEMAMix", "pytorch_optimizer", "AdEMAMix", "pytorch-optimizer", {"weight_decouple": True}),
    OptimizerKind("StableAdamW", "pytorch_optimizer", "StableAdamW", "pytorch-optimizer", {"kahan_sum": False}),
    OptimizerKind(PRODIGY_PLUS, "prodigyplus", PRODIGY_PLUS, "prodigy-plus-schedule-free", OWN_ROUNDING_OFF),
)


def kind_of(optimizer_type: str) -> OptimizerKind:
    """Return the optimizer of a name, in any case, or of a class path. Raise `UserError` for any other name."""
    by_name = {kind.name.lower(): kind for kind in OPTIMIZERS} | {"": OPTIMIZERS[0]}
    known = by_name.get(optimizer_type.lower())
    if known is not None:
        return known
    module, _, class_name = optimizer_type.rpartition(".")
    if module and class_name:
        return OptimizerKind(optimizer_type, module, class_name, package=module.partition(".")[0])
    nearest = [by_name[name].name for name in get_close_matches(optimizer_type.lower(), by_name, n=3)]
    names = dict.fromkeys([*nearest, *(kind.name for kind in OPTIMIZERS)])
    raise UserError(
        f"--optimizer_type is '{optimizer_type}'.", f"It must be one of {', '.join(names)}, or the path of a class."
    )
