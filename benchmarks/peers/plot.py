"""The rates of all engines as one SVG: prefill over the prompt's length, decode over context, and over streams.

Written by hand, since a plotting package would be this benchmark's largest dependency. Called by `../compare.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = ("#d55e00", "#0072b2", "#56b4e9", "#999999", "#009e73", "#cc79a7", "#e69f00")
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 300, 240, 60, 40, 70


def draw(report: Mapping[str, Any]) -> str:
    """Return the SVG's text."""
    lines: Sequence[Mapping[str, Any]] = report["figures"]
    short = min((line["tokens"] for line in lines if line["what"] == "decode"), default=0)
    panels = [
        ("prefill", "tokens of prompt", "tokens", [line for line in lines if line["what"] == "prefill"]),
        ("decode", "tokens of context", "tokens",
         [line for line in lines if line["what"] == "decode" and line["streams"] == 1]),
        (f"decode at {short} tokens", "streams", "streams",
         [line for line in lines if line["what"] == "decode" and line["tokens"] == short]),
    ]  # fmt: skip
    engines: Mapping[str, Mapping[str, Any]] = report["engines"]
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(engines)}
    width = _LEFT + len(panels) * (_WIDTH + _GAP)
    height = _TOP + _HEIGHT + 70 + 20 * len(engines)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"',
        '  font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for index, (title, axis, variable, points) in enumerate(panels):
        if points:
            parts += _panel(_LEFT + index * (_WIDTH + _GAP), title, axis, variable, points, colours)
    for index, (name, engine) in enumerate(engines.items()):
        y = _TOP + _HEIGHT + 65 + 20 * index
        parts.append(f'<rect x="{_LEFT}" y="{y - 9}" width="18" height="6" fill="{colours[name]}"/>')
        parts.append(f'<text x="{_LEFT + 26}" y="{y - 2}">{escape(str(engine["title"]))}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(
    left: int, title: str, axis: str, variable: str, lines: Sequence[Mapping[str, Any]], colours: Mapping[str, str]
) -> list[str]:
    values = [cell["highest"] for line in lines for cell in line["engines"].values() if "highest" in cell]
    top = _round_up(max(values, default=1.0))
    logs = [math.log2(max(1, line[variable])) for line in lines]
    low, span = min(logs), (max(logs) - min(logs)) or 1.0

    def x(position: int) -> float:
        return left + (math.log2(max(1, position)) - low) / span * _WIDTH

    def y(value: float) -> float:
        return _TOP + _HEIGHT * (1 - value / top)

    parts = [f'<text x="{left}" y="{_TOP - 16}" font-weight="bold">{title}, tokens/s</text>']
    for step in range(5):
        value = top * step / 4
        parts.append(f'<line x1="{left}" x2="{left + _WIDTH}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:,.0f}</text>')
    for line in lines:
        where = f'x="{x(line[variable]):.1f}" y="{_TOP + _HEIGHT + 18}"'
        parts.append(f'<text {where} text-anchor="middle">{line[variable]}</text>')
    parts.append(f'<text x="{left + _WIDTH / 2}" y="{_TOP + _HEIGHT + 38}" text-anchor="middle">{axis}</text>')
    for name, colour in colours.items():
        measured = [(x(line[variable]), line["engines"][name]) for line in lines if "median" in line["engines"][name]]
        points = " ".join(f"{across:.1f},{y(cell['median']):.1f}" for across, cell in measured)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for across, cell in measured:
            bar = f'x1="{across:.1f}" x2="{across:.1f}" y1="{y(cell["lowest"]):.1f}" y2="{y(cell["highest"]):.1f}"'
            parts.append(f'<line {bar} stroke="{colour}"/>')
            parts.append(f'<circle cx="{across:.1f}" cy="{y(cell["median"]):.1f}" r="3" fill="{colour}"/>')
    return parts


def _round_up(value: float) -> float:
    """Return the next of 1, 2, 4, 6, 8 or 10 times a power of ten: four steps of it are readable numbers."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= value)
