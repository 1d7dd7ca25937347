"""The plots of a build's report: SVG, written by hand, that takes its colours from the page's style.

Every plot is 340 units wide, so that its letters are readable on a phone and beside another plot on a wide screen.
Knows numbers and labels, no builds. Escapes what it is given. Called by `report`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hearthd.build.report.page import escape

__all__ = ["Bar", "Series", "bars", "forms_grid", "log_plot"]

_WIDTH = 340
_LEFT = 46  # room for the labels of the vertical axis
_RIGHT = 8


@dataclass(frozen=True, slots=True)
class Series:
    """Values by layer, all positive or 0; style: a class of the page's style sheet."""

    label: str
    style: str
    values: Sequence[float]
    is_line: bool = True


@dataclass(frozen=True, slots=True)
class Bar:
    """A labelled value."""

    label: str
    value: float
    text: str


def log_plot(title: str, series: Sequence[Series], *, unit: str, zero_label: str = "0") -> str:
    """Draw series over layers on a logarithmic axis; values of 0 stand on a line of their own below it."""
    height, top, bottom = 190, 10, 160
    positive = [value for each in series for value in each.values if value > 0]
    low = math.floor(math.log10(min(positive))) if positive else 0
    high = max(math.ceil(math.log10(max(positive))), low + 1) if positive else 1
    has_zero = any(value <= 0 for each in series for value in each.values)
    floor = bottom - 16 if has_zero else bottom

    def y(value: float) -> float:
        if value <= 0:
            return bottom
        return floor - (math.log10(value) - low) / (high - low) * (floor - top)

    num_layers = max(len(each.values) for each in series)

    def x(layer: int) -> float:
        return _LEFT + 6 + layer * (_WIDTH - _LEFT - _RIGHT - 12) / max(num_layers - 1, 1)

    parts: list[str] = []
    # At most some six lines, however many powers of ten there are; and more than the ends of a single one.
    for power in range(low, high + 1, math.ceil((high - low) / 5)):
        at = y(10.0**power)
        parts += [_line("grid", _LEFT, at, _WIDTH - _RIGHT, at), _text("tick end", _LEFT - 6, at + 4, _power(power))]
    for factor in (2, 5) if high == low + 1 else ():
        at = y(factor * 10.0**low)
        parts += [
            _line("grid", _LEFT, at, _WIDTH - _RIGHT, at),
            _text("tick end", _LEFT - 6, at + 4, _power(low, factor)),
        ]
    if has_zero:
        parts.append(_line("grid zero", _LEFT, bottom, _WIDTH - _RIGHT, bottom))
        parts.append(_text("tick end", _LEFT - 6, bottom + 4, zero_label))
    parts += [_text("tick middle", x(layer), bottom + 17, str(layer)) for layer in _ticks(num_layers)]
    parts.append(_text("tick middle", (_LEFT + _WIDTH) / 2, height - 2, "layer"))
    for each in series:
        points = [(x(layer), y(value)) for layer, value in enumerate(each.values)]
        if each.is_line:
            joined = " ".join(f"{left:.1f},{at:.1f}" for left, at in points)
            parts.append(f'<polyline class="line {escape(each.style)}" points="{joined}"/>')
        radius = 1.9 if each.is_line else 3.4
        for layer, (left, at) in enumerate(points):
            shown = f"layer {layer}, {each.label}: {each.values[layer]:.3g} {unit}".rstrip()
            parts.append(
                f'<circle class="dot {escape(each.style)}" cx="{left:.1f}" cy="{at:.1f}" r="{radius}">'
                f"<title>{escape(shown)}</title></circle>"
            )
    return _svg(title, height, parts)


def bars(title: str, values: Sequence[Bar], *, marks: Sequence[tuple[str, float]]) -> str:
    """Draw a bar for each value, and a line with a label for each mark."""
    left, right, step, top = 92, 60, 24, 22
    height = top + step * len(values) + 6
    largest = max([*(bar.value for bar in values), *(value for _, value in marks), 1e-12])
    scale = (_WIDTH - left - right) / largest
    parts: list[str] = []
    for index, (label, value) in enumerate(marks):
        at = left + value * scale
        parts.append(_line(f"mark mark{index}", at, top - 5, at, height - 4))
        parts.append(_text("tick middle", at, top - 10, label))
    for index, bar in enumerate(values):
        at = top + index * step
        width = max(bar.value * scale, 1)
        style = "bar first" if index == 0 else "bar"
        parts.append(_text("label end", left - 8, at + 15, bar.label))
        parts.append(f'<rect class="{style}" x="{left}" y="{at + 4}" width="{width:.1f}" height="15" rx="2"/>')
        parts.append(_text("value", left + width + 6, at + 15.5, bar.text))
    return _svg(title, height, parts)


def forms_grid(title: str, rows: Mapping[str, Sequence[tuple[str, int, str]]]) -> str:
    """Draw a row of cells for each kind of matmul, one for each layer.

    rows: kind -> (class of the page's style, level 1 to 3 that the cell is filled to, what the cell says).
    """
    left, step, top, cell = 62, 27, 6, 21
    height = top + step * len(rows) + 26
    num_layers = max(map(len, rows.values()))
    width = (_WIDTH - left - _RIGHT) / num_layers
    gap = min(1.5, width * 0.2)
    parts: list[str] = []
    for index, (kind, cells) in enumerate(rows.items()):
        at = top + index * step
        parts.append(_text("label end", left - 8, at + 15, kind))
        for layer, (style, level, shown) in enumerate(cells):
            # A wider cell where a row has but one: the head's.
            across = min(max(width, 9.0), 24.0) if len(cells) == 1 else width
            at_x, filled = left + layer * width, cell * level / 3
            place = f'x="{at_x:.2f}" width="{across - gap:.2f}"'
            parts.append(f'<g><title>{escape(shown)}</title><rect class="empty" {place} y="{at}" height="{cell}"/>')
            parts.append(
                f'<rect class="{escape(style)}" {place} y="{at + cell - filled:.1f}" height="{filled:.1f}"/></g>'
            )
    bottom = top + step * len(rows)
    parts += [
        _text("tick middle", left + (layer + 0.5) * width, bottom + 9, str(layer)) for layer in _ticks(num_layers)
    ]
    parts.append(_text("tick middle", (left + _WIDTH) / 2, bottom + 23, "layer"))
    return _svg(title, height, parts)


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _line(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(style: str, x: float, y: float, text: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _ticks(num_layers: int) -> Iterator[int]:
    """Return layers to name on an axis: round numbers, some seven of them."""
    step = next(
        (step for step in (1, 2, 5, 10, 20, 50, 100) if num_layers / step <= 7), max(math.ceil(num_layers / 7), 1)
    )
    return iter(range(0, num_layers, step))


def _power(power: int, factor: int = 1) -> str:
    if -2 <= power <= 3:
        return f"{factor * 10.0**power:g}"
    return ("10" if factor == 1 else f"{factor}·10") + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
