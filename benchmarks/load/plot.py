"""How long requests waited, as one SVG: a panel for each rate and time, a curve for each server.

A curve says which share of requests waited at most how long. Written by hand, as `../peers/plot.py`. Called by
`../serve.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from load.report import rates

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = ("#d55e00", "#0072b2", "#56b4e9")
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP_X, _GAP_Y = 320, 200, 60, 40, 70, 80
_TIMES = {"first_token_ms": "time to first token", "inter_token_ms": "inter-token time"}
_SERVERS = {"house": "Hearth", "peer": "llama-cpp-python's server"}


def draw(report: Mapping[str, Any]) -> str:
    """Return the SVG's text. There are no panels if no arrivals were offered."""
    scenarios = report["scenarios"]
    names = rates(scenarios)
    titles: list[str] = []
    panels = []
    for row, rate in enumerate(names):
        for column, (times, title) in enumerate(_TIMES.items()):
            curves = {}
            for server, label in _SERVERS.items():
                for name, found in scenarios.get(server, {}).get("figures", {}).items():
                    if name.partition(",")[0] == rate and times in found["curves"]:
                        curves[label + name[len(rate) :]] = found["curves"][times]
            titles += [label for label in curves if label not in titles]
            left, top = _LEFT + column * (_WIDTH + _GAP_X), _TOP + row * (_HEIGHT + _GAP_Y)
            panels.append((left, top, f"{title}, {rate}", curves))
    colours = {label: _COLOURS[index % len(_COLOURS)] for index, label in enumerate(titles)}
    width = _LEFT + len(_TIMES) * (_WIDTH + _GAP_X)
    below = _TOP + len(names) * (_HEIGHT + _GAP_Y)
    height = below + 20 * len(titles) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"',
        '  font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for left, top, title, curves in panels:
        if curves:
            parts += _panel(left, top, title, curves, colours)
    for index, label in enumerate(titles):
        y = below + 20 * index
        parts.append(f'<rect x="{_LEFT}" y="{y - 9}" width="18" height="6" fill="{colours[label]}"/>')
        parts.append(f'<text x="{_LEFT + 26}" y="{y - 2}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(
    left: int, top: int, title: str, curves: Mapping[str, Sequence[float]], colours: Mapping[str, str]
) -> list[str]:
    """Draw the distribution of each curve's values: milliseconds across, in powers of ten, and the share upwards."""
    values = [max(value, 0.01) for curve in curves.values() for value in curve] or [1.0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)

    def x(value: float) -> float:
        return left + (math.log10(max(value, 0.01)) - low) / max(high - low, 1) * _WIDTH

    def y(share: float) -> float:
        return top + _HEIGHT * (1 - share)

    parts = [f'<text x="{left}" y="{top - 12}" font-weight="bold">{escape(title)}</text>']
    for share in (0.0, 0.5, 0.95, 1.0):
        parts.append(f'<line x1="{left}" x2="{left + _WIDTH}" y1="{y(share):.1f}" y2="{y(share):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y(share) + 4:.1f}" text-anchor="end">{100 * share:.0f} %</text>')
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{top + _HEIGHT}" stroke="#eee"/>')
        parts.append(f'<text x="{at:.1f}" y="{top + _HEIGHT + 18}" text-anchor="middle">{10.0**power:g} ms</text>')
    for label, curve in curves.items():
        # Points are percentiles of all requests: a curve ends where the others got no answer.
        shares = [(place + 1) / 100 for place in range(len(curve))]
        points = " ".join(f"{x(value):.1f},{y(share):.1f}" for value, share in zip(curve, shares, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colours[label]}" stroke-width="2"/>')
    return parts
