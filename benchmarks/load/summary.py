"""What came of many requests, as an object that can be written as JSON. Called by the scenarios."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from load.measures import jain_index, percentiles, worst_wait_ratio
from load.outcome import End, Outcome


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Sum up. There must be at least one.

    Times are of whole answers alone, refusals are counted beside them; tokens/s are those of whole answers from the
    time at which the first request was due to the end of the last one.
    """
    answered = _ended(outcomes, End.ANSWERED)
    seconds = max(each.ended for each in outcomes) - min(each.scheduled for each in outcomes)
    tokens = sum(each.completion_tokens for each in answered)
    prompt_tokens = sum(each.prompt_tokens for each in answered)
    summary = {
        "requests": len(outcomes),
        "answered": len(answered),
        "refused": dict(Counter(each.reason for each in _ended(outcomes, End.REFUSED))),
        "failed": dict(Counter(each.reason for each in _ended(outcomes, End.FAILED))),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "answers_per_second": len(answered) / seconds,
        "cached_share_of_prompts": sum(each.cached_tokens for each in answered) / max(prompt_tokens, 1),
        "generator_late_ms": 1000 * max(each.sent - each.scheduled for each in outcomes),
        "fairness": fairness(outcomes),
        **times(answered),
    }
    priorities = sorted({each.priority for each in answered if each.priority})
    summary["by_priority"] = {name: times([each for each in answered if each.priority == name]) for name in priorities}
    return summary


def times(answered: Iterable[Outcome]) -> dict[str, Any]:
    """Return time to first token and inter-token time."""
    answered = list(answered)
    first = [1000 * each.first_token_seconds for each in answered if each.first_token_seconds is not None]
    gaps = [1000 * gap for each in answered for gap in each.gaps]
    return {"first_token_ms": percentiles(first), "inter_token_ms": percentiles(gaps)}


def fairness(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """Compare callers who wanted the same: their shares of all tokens written, and how long they waited for the first.

    One who was refused has got less, and is in no waiting time.
    """
    callers = sorted({each.caller for each in outcomes})
    tokens = {
        name: sum(each.completion_tokens for each in _ended(outcomes, End.ANSWERED) if each.caller == name)
        for name in callers
    }
    waits = {
        name: [
            each.first_token_seconds
            for each in _ended(outcomes, End.ANSWERED)
            if each.caller == name and each.first_token_seconds is not None
        ]
        for name in callers
    }
    return {"jain_index": jain_index(list(tokens.values())), "worst_wait_ratio": worst_wait_ratio(waits)}


def _ended(outcomes: Iterable[Outcome], end: End) -> list[Outcome]:
    return [each for each in outcomes if each.end is end]
