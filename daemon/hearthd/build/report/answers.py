"""The section of a build's report that has the greedy answers side by side, and judges where they part.

Knows token ids and a tokenizer, no sessions. Called by `report`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hearthd.build.report.greedy_comparison import NEAR_TIE, Comparison, Parting, pieces
from hearthd.build.report.page import escape, paragraph, section
from hearthd.text.tokenizer import ChatTokenizer

__all__ = ["answers", "summary", "verdict"]

_END_OF_TURN = "end of turn"


def answers(comparisons: Sequence[Comparison], tokenizer: ChatTokenizer) -> str:
    """Return both answers to each prompt, the first token that differs marked, with a verdict on each and on all."""
    html = [
        paragraph(
            "What a chat would see: each prompt answered by always taking the likeliest token. Where the answers part, "
            "the lead says how much more likely float32 held its own token than the one that int8 chose: up to "
            f"{NEAR_TIE:g} nats ({math.exp(NEAR_TIE):.2f} times) is a near tie, in which either would have done; more "
            "is a real error. After that the two answer different texts, and nothing follows from their difference."
        ),
        paragraph(verdict(comparisons), _good(not any(_is_error(each) for each in comparisons))),
        *(_exchange(each, tokenizer) for each in comparisons),
    ]
    return section("Greedy answers, side by side", html)


def summary(comparisons: Sequence[Comparison]) -> str:
    """Judge all answers in one line."""
    same = sum(each.parting is None for each in comparisons)
    errors = sum(_is_error(each) for each in comparisons)
    near = len(comparisons) - same - errors
    return (
        f"Greedy answers: {same} of {len(comparisons)} the same, {near} part at a near tie, {errors} at a real error."
    )


def verdict(comparisons: Sequence[Comparison]) -> str:
    """Judge all answers in a few sentences."""
    if not comparisons:
        return "The context is too short for any of the prompts: no answers were compared."
    same = sum(each.parting is None for each in comparisons)
    errors = sum(_is_error(each) for each in comparisons)
    partings = [parting for each in comparisons for parting in each.partings]
    clear = sum(not parting.is_near_tie for parting in partings)
    length = sum(len(each.reference) for each in comparisons)
    return (
        f"Of {len(comparisons)} answers {same} {_is_or_are(same)} the same to the last token, "
        f"{len(comparisons) - same - errors} part at a near tie and {errors} at a real error. All along the float32 "
        f"answers, int8 would have chosen {length - len(partings)} of {length} tokens; of the other {len(partings)}, "
        f"{clear or 'none'} {_is_or_are(clear or 1)} more than a near tie."
    )


def _exchange(comparison: Comparison, tokenizer: ChatTokenizer) -> str:
    position = comparison.parting.position if comparison.parting else None
    columns = "".join(
        f'<div><h4>{label}</h4><p class="answer" dir="auto">{_marked(token_ids, position, tokenizer)}</p></div>'
        for label, token_ids in (("float32", comparison.reference), ("int8", comparison.tested))
    )
    return (
        f'<article class="exchange"><h3><span>{escape(comparison.kind)}</span>'
        f'<bdi>{escape(comparison.prompt)}</bdi></h3><div class="answers">{columns}</div>'
        f"{_judgement(comparison, tokenizer)}</article>"
    )


def _marked(token_ids: Sequence[int], position: int | None, tokenizer: ChatTokenizer) -> str:
    """Return an answer as HTML, its token at `position` marked."""
    texts = [
        _shown(token_id, text, tokenizer)
        for token_id, text in zip(token_ids, pieces(tokenizer, token_ids), strict=True)
    ]
    if token_ids[-1] not in tokenizer.eos_ids:
        texts.append('<span class="cut">…</span>')
    if position is None:
        return "".join(texts)
    marked = texts[position] or f"token {token_ids[position]}"
    rest = "".join(texts[position + 1 :])
    return f'{"".join(texts[:position])}<mark>{marked}</mark><span class="apart">{rest}</span>'


def _shown(token_id: int, text: str, tokenizer: ChatTokenizer) -> str:
    return f'<span class="turn">{_END_OF_TURN}</span>' if token_id in tokenizer.eos_ids else escape(text)


def _judgement(comparison: Comparison, tokenizer: ChatTokenizer) -> str:
    length = len(comparison.reference)
    parting = comparison.parting
    if parting is None:
        return paragraph(f"The same {length} tokens.", "soft")
    own, other = (_quoted(answer, parting.position, tokenizer) for answer in (comparison.reference, comparison.tested))
    kind = "a near tie" if parting.is_near_tie else "a real error"
    return paragraph(
        f"They part at token {parting.position + 1}: float32 says {own}, int8 {other}. Float32 held its own "
        f"{parting.lead:.3f} nats ({_times(parting)}) likelier: {kind}. Along the float32 answer int8 would have "
        f"chosen {comparison.num_agreed} of {length} tokens.",
        "soft" if parting.is_near_tie else "bad",
    )


def _quoted(answer: Sequence[int], position: int, tokenizer: ChatTokenizer) -> str:
    if answer[position] in tokenizer.eos_ids:
        return _END_OF_TURN
    text = pieces(tokenizer, answer)[position]
    # White space has to be seen.
    return f"“{text}”".replace("\n", "↵").replace(" ", "␣") if text else f"token {answer[position]}"


def _times(parting: Parting) -> str:
    # A lead past this says no more than that it is large.
    return f"{math.exp(parting.lead):.2f} times" if parting.lead < 5 else "over 100 times"


def _is_error(comparison: Comparison) -> bool:
    return comparison.parting is not None and not comparison.parting.is_near_tie


def _is_or_are(number: int) -> str:
    return "is" if number == 1 else "are"


def _good(is_good: bool) -> str:
    return "verdict good" if is_good else "verdict bad"
