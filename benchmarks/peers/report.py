"""What a contest gave, as one JSON object and as a Markdown table.

Knows figures and names, no processes. Called by `../compare.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from contest import Contestant
from figures import Figure, Samples, Summary, best_of, ratio, summarise

_TITLES = {
    "load": "opening the model to the first token",
    "start": "starting the process to the first token",
    "resident": "resident",
    "own": "of that, its own (anonymous)",
    "file": "of that, mapped files",
}


def figure_title(figure: Figure) -> str:
    """Name a line of the table."""
    if figure.what == "prefill":
        return f"prefill, {figure.tokens} tokens"
    if figure.what == "decode":
        streams = "1 stream" if figure.streams == 1 else f"{figure.streams} streams"
        return f"decode, {streams}, context {figure.tokens}"
    if figure.unit == "s":
        return _TITLES[figure.what]
    when = f"a full slot of {figure.tokens}" if figure.tokens else "after loading"
    return f"{_TITLES[figure.what]}, {when}"


def results(
    samples: Samples, figures: Sequence[Figure], contestants: Sequence[Contestant], ours: str
) -> list[dict[str, Any]]:
    """Return a JSON-ready line for each figure: every engine's values, and our ratio to each peer's best way.

    Ratios say how many times better `ours` is, whether more or less is better.
    """
    lines = []
    for figure in figures:
        line: dict[str, Any] = {"title": figure_title(figure), "unit": figure.unit, **asdict(figure)}
        line["more_is_better"] = figure.more_is_better
        line["engines"] = {contestant.name: _cell(samples, contestant.name, figure) for contestant in contestants}
        line["ratios"] = _ratios(samples, figure, contestants, ours)
        lines.append(line)
    return lines


def _cell(samples: Samples, name: str, figure: Figure) -> dict[str, Any]:
    if reason := samples.missing.get((name, figure)):
        return {"missing": reason}
    values = samples.rounds(name, figure)
    if not values:
        return {"missing": "not measured"}
    return {**_rounded(summarise(values)), "rounds": [_significant(value) for value in values]}


def _ratios(
    samples: Samples, figure: Figure, contestants: Sequence[Contestant], ours: str
) -> dict[str, dict[str, Any]]:
    our_values = samples.rounds(ours, figure)
    found: dict[str, dict[str, Any]] = {}
    for peer in dict.fromkeys(contestant.peer for contestant in contestants if contestant.name != ours):
        series = {
            contestant.name: values
            for contestant in contestants
            if contestant.peer == peer and (values := samples.rounds(contestant.name, figure))
        }
        # "own" and "file" are parts of a sum: less of one is not better by itself.
        if our_values and series and figure.what not in ("own", "file"):
            against = best_of(series, more_is_better=figure.more_is_better)
            summary = ratio(our_values, series[against], more_is_better=figure.more_is_better)
            found[peer] = {"against": against, **_rounded(summary)}
    return found


def _rounded(summary: Summary) -> dict[str, float]:
    return {name: _significant(value) for name, value in asdict(summary).items()}


def _significant(value: float) -> float:
    return float(f"{value:.4g}")


def markdown(report: Mapping[str, Any]) -> str:
    """Return the whole report: the machine, a table of values, a table of ratios, notes on what is missing."""
    machine, settings = report["machine"], report["settings"]
    engines: Mapping[str, Mapping[str, Any]] = report["engines"]
    flags = ", ".join(machine["flags"])
    text = [
        f"{settings['model']} on {machine['processor']} ({flags}), {machine['cores']} cores,",
        f"{settings['threads']} threads, {report['date']}.",
        f"Medians over {settings['rounds']} after a first round to warm up; lowest to highest in brackets.",
        "",
    ]
    for name, engine in engines.items():
        about = f"{engine.get('version', '')}; {engine.get('settings', '')}".strip("; ")
        text.append(f"- **{engine['title']}** (`{name}`): {about or 'took no part'}")
    notes: dict[str, list[str]] = {}
    rows = [_value_row(line, engines, notes) for line in report["figures"]]
    text += ["", *_table(["", *(engine["title"] for engine in engines.values())], rows)]
    peers = list(dict.fromkeys(peer for line in report["figures"] for peer in line["ratios"]))
    if peers:
        text += [
            "",
            "How many times better than each peer's best setting for that figure (more for rates, less for seconds and",
            "megabytes): the ratio within each round, then the median.",
            "",
        ]
        text += _table(["", *peers], [_ratio_row(line, peers) for line in report["figures"] if line["ratios"]])
    if notes:
        text += ["", "Not measured:", ""]
        text += [f"- {reason}: {', '.join(where)}" for reason, where in notes.items()]
    return "\n".join(text) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]


def _value_row(line: Mapping[str, Any], engines: Mapping[str, Any], notes: dict[str, list[str]]) -> list[str]:
    cells = [f"{line['title']} ({line['unit']})"]
    for name, engine in engines.items():
        cell = line["engines"][name]
        if "missing" in cell:
            # One reason is said once, with all that it applies to: an engine that is not there misses every line.
            notes.setdefault(f"{engine['title']}: {cell['missing']}", []).append(line["title"])
            cells.append("not measured")
        else:
            cells.append(f"{_number(cell['median'])} ({_number(cell['lowest'])}-{_number(cell['highest'])})")
    return cells


def _ratio_row(line: Mapping[str, Any], peers: Sequence[str]) -> list[str]:
    cells = [str(line["title"])]
    for peer in peers:
        found = line["ratios"].get(peer)
        cells.append(f"{found['median']:.2f} ({found['lowest']:.2f}-{found['highest']:.2f})" if found else "")
    return cells


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
