"""Which curves of a run are shown in one chart."""

import re
from collections.abc import Callable, Iterable, Iterator

ERROR_SUFFIX = "/standard_error"
"""Ends the name of a curve that is the standard error of another."""


def charts_of(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the charts that have curves: title, names."""
    known = list(names)
    for title, belongs in _CHARTS.items():
        chosen = [name for name in known if belongs(name)]
        if chosen:
            yield title, chosen


_CHARTS: dict[str, Callable[[str], bool]] = {
    "Loss": lambda name: name in ("loss/average", "loss/current"),
    "Loss on images that are not trained": lambda name: bool(re.fullmatch(r"validation[^/]*/[^/]+", name)),
    "What each encoder is worth": lambda name: bool(re.fullmatch(r"worth[^/]*/[^/]+", name)),
    "Learning rates": lambda name: name.startswith("lr/") and "encoder1" not in name and "encoder2" not in name,
    "Gradient norm": lambda name: name == "grad_norm",
    "Images a second": lambda name: name == "images_per_second",
}
