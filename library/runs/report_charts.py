"""Curves as SVG, for a page that needs nothing beside it."""

from collections.abc import Iterable, Iterator, Mapping
from html import escape

import numpy as np

from library.optim.curve_image import Scale
from library.runs.curves import Curve, thinned

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 10, 10, 28  # margins around the axes
_COLOURS = ("#2d7dd2", "#d9822b", "#3a9b5c", "#b3261e", "#7b5ea7", "#5a6576", "#c2498f", "#12908e")
_NUM_POINTS = 1200  # more than a screen shows side by side
_NUM_TICKS = 4


def chart(
    title: str, curves: Mapping[str, Curve], errors: Mapping[str, Curve], marks: Mapping[str, Iterable[int]]
) -> str:
    """Return a figure of the curves, with a band of one error above and below those that have one.

    `marks` are steps by what happened there; each is a line with a tooltip.
    """
    across, up = _over_steps(curves), _over_values(curves, errors)
    parts = [*_axes(across, up), *_mark_lines(marks, across)]
    for place, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[place % len(_COLOURS)]
        if name in errors:
            parts.append(_band(curve, errors[name], across, up, colour))
        parts.append(_line(name, thinned(curve, _NUM_POINTS), across, up, colour))
    legend = "".join(
        f'<span><i style="background:{_COLOURS[place % len(_COLOURS)]}"></i>{escape(name)} '
        f"<b>{curve.values[-1]:.4g}</b></span>"
        for place, (name, curve) in enumerate(curves.items())
    )
    return (
        f'<figure class="card chart"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'role="img" aria-label="{escape(title)} over optimizer steps">{"".join(parts)}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def _over_steps(curves: Mapping[str, Curve]) -> Scale:
    ends = [(curve.steps[0], curve.steps[-1]) for curve in curves.values()]
    return _scale(min(first for first, _ in ends), max(last for _, last in ends), _LEFT, _WIDTH - _RIGHT)


def _over_values(curves: Mapping[str, Curve], errors: Mapping[str, Curve]) -> Scale:
    edges = [_edge(curves[name], errors[name], sign) for name in errors for sign in (-1, 1)]
    values = np.concatenate([curve.values for curve in curves.values()] + edges)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    return _scale(min(low, 0.0) if low < high / 2 else low, high, _HEIGHT - _BOTTOM, _TOP)


def _scale(start: float, end: float, low: float, high: float) -> Scale:
    return Scale(float(start), float(end if end > start else start + 1), low, high)


def _ticks(scale: Scale) -> list[float]:
    return [scale.start + (scale.end - scale.start) * number / _NUM_TICKS for number in range(_NUM_TICKS + 1)]


def _axes(across: Scale, up: Scale) -> Iterator[str]:
    for value in _ticks(up):
        y = up(value)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
    for step in dict.fromkeys(map(round, _ticks(across))):
        yield f'<text x="{across(step):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{step}</text>'


def _mark_lines(marks: Mapping[str, Iterable[int]], across: Scale) -> Iterator[str]:
    for what, steps in marks.items():
        for step in steps:
            if across.start <= step <= across.end:
                x = across(step)
                yield f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}">'
                yield f"<title>step {step}: {escape(what)}</title></line>"


def _line(name: str, curve: Curve, across: Scale, up: Scale, colour: str) -> str:
    known = np.isfinite(curve.values)
    points = _points(across(curve.steps[known].astype(float)), up(curve.values[known]))
    return f'<polyline points="{points}" stroke="{colour}"><title>{escape(name)}</title></polyline>'


def _band(curve: Curve, error: Curve, across: Scale, up: Scale, colour: str) -> str:
    x = across(curve.steps.astype(float))
    above, below = up(_edge(curve, error, 1)), up(_edge(curve, error, -1))
    points = f"{_points(x, above)} {_points(x[::-1], below[::-1])}"
    return f'<polygon points="{points}" fill="{colour}" opacity=".18"/>'


def _edge(curve: Curve, error: Curve, sign: int) -> np.ndarray:
    """Return the curve moved by its error; points whose error is not known stay where they are."""
    of_step = dict(zip(error.steps.tolist(), error.values.tolist(), strict=True))
    return curve.values + sign * np.array([of_step.get(step, 0.0) for step in curve.steps.tolist()])


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{each_x:.1f},{each_y:.1f}" for each_x, each_y in zip(x, y, strict=True))
