"""Curves over the steps of a run as an image."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT = 1200, 640
_LEFT, _RIGHT, _TOP, _BOTTOM = 110, 310, 60, 70  # margins around the axes, in pixels
_TEXT_SIZE = 16
_PAPER, _INK, _GRID = "#ffffff", "#202020", "#dddddd"
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf")
_MOST_NAMED = 18
"""Curves that have their name beside the axes: there is room for so many."""
_NUM_TICKS = 5


def draw_curves(title: str, steps: Sequence[int], curves: Mapping[str, Sequence[float]]) -> Image.Image:
    """Return an image of the `curves` over `steps`, with their names; equal curves are drawn as one."""
    image = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(_TEXT_SIZE)
    pen.text((_LEFT, _TOP - 36), title, fill=_INK, font=font)
    rate_ticks = ticks(max((max(values) for values in curves.values()), default=0.0))
    step_ticks = [round(tick) for tick in ticks(float(steps[-1])) if tick <= steps[-1] and tick == round(tick)]
    across = Scale(0, max(1, steps[-1]), _LEFT, _WIDTH - _RIGHT)
    up = Scale(0, rate_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    for rate in rate_ticks:
        pen.line([(across.low, up(rate)), (across.high, up(rate))], fill=_GRID)
        pen.text((across.low - 10, up(rate)), f"{rate:.3g}", fill=_INK, font=font, anchor="rm")
    for step in step_ticks:
        pen.line([(across(step), up.low), (across(step), up.high)], fill=_GRID)
        pen.text((across(step), up.low + 10), str(step), fill=_INK, font=font, anchor="mt")
    pen.text(((across.low + across.high) / 2, _HEIGHT - 24), "steps", fill=_INK, font=font, anchor="mm")
    pen.line([(across.low, up.high), (across.low, up.low), (across.high, up.low)], fill=_INK)
    for place, (name, values) in enumerate(equal_together(curves).items()):
        colour = _COLOURS[place % len(_COLOURS)]
        pen.line([(across(step), up(rate)) for step, rate in zip(steps, values, strict=True)], fill=colour, width=3)
        if place < _MOST_NAMED:
            x, y = _WIDTH - _RIGHT + 20, _TOP + place * (_TEXT_SIZE + 11)
            pen.line([(x, y), (x + 24, y)], fill=colour, width=3)
            pen.text((x + 32, y), name, fill=_INK, font=font, anchor="lm")
    return image


class Scale:
    """From numbers to the drawing: `start` lies at `low`, `end` at `high`."""

    def __init__(self, start: float, end: float, low: float, high: float):
        self.start, self.end = start, end
        self.low, self.high = low, high

    def __call__(self, value: Any) -> Any:
        """Return where a number, or each of an array, lies."""
        return self.low + (value - self.start) / (self.end - self.start) * (self.high - self.low)


def ticks(highest: float) -> list[float]:
    """Return about five round numbers from 0, evenly spaced, of which the last is `highest` or more."""
    if highest <= 0:
        return [0.0, 1.0]
    rough = highest / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(each for each in (1, 2, 2.5, 5, 10) if power * each >= rough * (1 - 1e-9))
    return [place * step for place in range(math.ceil(highest / step * (1 - 1e-9)) + 1)]


def equal_together(curves: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """Return the different curves; one that several have is named by all of them: "unet block 0-3, 5"."""
    names: dict[tuple[float, ...], list[str]] = {}
    for name, values in curves.items():
        names.setdefault(tuple(values), []).append(name)
    return {_shared_name(each): values for values, each in names.items()}


def _shared_name(names: Sequence[str]) -> str:
    """Return names that differ in the number at their end as one: runs of numbers are ranges."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        stem, _, number = name.rpartition(" ")
        if number.isdigit():
            numbers.setdefault(stem, []).append(int(number))
        else:
            numbers[name] = []
    return ", ".join(f"{stem} {_ranges(found)}".rstrip() for stem, found in numbers.items())


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
