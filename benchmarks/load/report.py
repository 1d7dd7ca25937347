"""A run as Markdown: the table of targets, and the servers side by side under the same arrivals.

Knows the object that is written as JSON, no requests. Called by `../serve.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from load.targets import Verdict

_TITLES = {"house": "Hearth", "peer": "llama-cpp-python"}
_Row = tuple[str, Sequence[str]]


def markdown(report: Mapping[str, Any]) -> str:
    """Return the whole report."""
    machine, settings = report["machine"], report["settings"]
    run_on = (
        f"Run on {report['date']}: {settings['model']} on {machine['processor']} ({', '.join(machine['flags'])}), "
        f"{machine['cores']} cores, {settings['threads']} threads, {settings['slots']} slots, seed {settings['seed']}; "
        f"load average {machine['load_average']:.1f} at the start; {report['seconds']:,} s."
    )
    text = [run_on]
    if settings["scale"] != 1:
        text.append(f"**Not the whole run**: --scale {settings['scale']:g} of its rounds, requests and seconds.")
    scenarios: Mapping[str, Mapping[str, Any]] = report["scenarios"]
    rows = [
        (target["name"], (target["wanted"], measured(target), str(target["verdict"]), target["note"]))
        for scenario in scenarios.values()
        for target in scenario["targets"]
    ]
    if rows:
        text += ["", *_table(("target", "wanted", "measured", "", ""), rows)]
    if any(scenarios[server]["figures"] for server in _TITLES if server in scenarios):
        text += ["", *side_by_side(scenarios)]
    text += _missing(scenarios, report["left_out"])
    return "\n".join(text) + "\n"


def measured(target: Mapping[str, Any]) -> str:
    """Return a target's value, as a reader wants it."""
    if target["verdict"] == Verdict.NOT_AVAILABLE or target["measured"] is None:
        return "-"
    return f"{number(target['measured'])} {target['unit']}".strip()


def side_by_side(scenarios: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a table with a column for each server and rate."""
    columns: list[tuple[str, Mapping[str, Any]]] = []
    for rate in rates(scenarios):
        for server, title in _TITLES.items():
            for name, found in scenarios.get(server, {"figures": {}})["figures"].items():
                if name.partition(",")[0] == rate:
                    columns.append((f"{title}, {name}", found))
    rows: list[_Row] = [
        ("requests", [f"{each['requests']}" for _, each in columns]),
        ("answered", [f"{each['answered']}" for _, each in columns]),
        ("refused", [_counts(each["refused"]) for _, each in columns]),
        ("failed", [_counts(each["failed"]) for _, each in columns]),
        ("time to first token, p50 / p95 / p99, ms", [_percentiles(each["first_token_ms"]) for _, each in columns]),
        ("inter-token time, p50 / p95 / p99, ms", [_percentiles(each["inter_token_ms"]) for _, each in columns]),
    ]
    for priority in ("interactive", "normal", "background"):
        cells = [_percentiles(each["by_priority"].get(priority, {}).get("first_token_ms")) for _, each in columns]
        rows.append((f"time to first token, {priority}", cells))
    rows += [
        ("tokens/s of whole answers", [number(each["tokens_per_second"]) for _, each in columns]),
        ("prompt tokens from a cache", [_share(each) for _, each in columns]),
        ("Jain index of tokens over callers", [_optional(each["fairness"]["jain_index"]) for _, each in columns]),
        (
            "longest mean wait of a caller / mean",
            [_optional(each["fairness"]["worst_wait_ratio"]) for _, each in columns],
        ),
        ("resident at the end, MB", [number(each["resident_mb"]) for _, each in columns]),
        ("generator late by at most, ms", [number(each["generator_late_ms"]) for _, each in columns]),
    ]
    return _table(("", *(title for title, _ in columns)), rows)


def rates(scenarios: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of the rates at which any server was offered arrivals, in their order."""
    names = [name for server in _TITLES if server in scenarios for name in scenarios[server]["figures"]]
    return list(dict.fromkeys(name.partition(",")[0] for name in names))


def number(value: float) -> str:
    """Return a number with as many digits as mean something."""
    if value == float("inf"):
        return "never"
    if value == int(value) and abs(value) < 1e6:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _missing(scenarios: Mapping[str, Mapping[str, Any]], left_out: Sequence[str]) -> list[str]:
    lines = [f"- {name}: {scenario['error']}" for name, scenario in scenarios.items() if scenario.get("error")]
    lines += [f"- {name}: left out; `--only {name}` runs it" for name in left_out]
    return ["", "Not measured:", "", *lines] if lines else []


def _table(header: Sequence[str], rows: Sequence[_Row]) -> list[str]:
    lines = [header, *((name, *cells) for name, cells in rows)]
    text = [f"| {' | '.join(cells)} |" for cells in lines]
    return [text[0], "|---" * len(header) + "|", *text[1:]]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "0"


def _percentiles(values: Mapping[str, float] | None) -> str:
    return " / ".join(number(values[name]) for name in ("p50", "p95", "p99")) if values else "-"


def _share(found: Mapping[str, Any]) -> str:
    # Its server does not tell while it streams.
    return f"{100 * found['cached_share_of_prompts']:.0f} %" if found["cached_share_of_prompts"] else "-"


def _optional(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
