"""How calls and chats end is told in a bounded set of words, each end once."""

import pytest

from hearthd import errors
from hearthd.sequences.events import Finished, FinishReason
from hearthd.watching.outcomes import (
    CHAT_OUTCOMES,
    ChatEnd,
    Refusal,
    Unfinished,
    refusal_of,
    tell_refusal,
    unfinished_by,
)
from hearthd.watching.tally import Speeds, Tally


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        (errors.QueueFullError("x", 1.0), Refusal.QUEUE_FULL),
        (errors.QuotaExceededError("anna", "requests_per_minute = 3 of role kid", "x", 1.0), Refusal.RATE),
        (errors.QuotaExceededError("anna", "tokens_per_minute = 3 of role kid", "x", 1.0), Refusal.RATE),
        (errors.QuotaExceededError("anna", "tokens_per_day = 3 of role kid", "x", 1.0), Refusal.QUOTA),
        (errors.QuotaExceededError("anna", "max_concurrent_chats = 3 of role kid", "x", 1.0), Refusal.TOO_MANY_CHATS),
        (errors.UnauthenticatedError("x"), Refusal.UNAUTHENTICATED),
        (errors.NotPermittedError("x"), Refusal.NOT_PERMITTED),
        (errors.PolicyRefusedError("x", "rule"), Refusal.POLICY),
        (errors.InvalidRequestError("messages", "x"), Refusal.INVALID),
        (errors.ModelNotFoundError("x"), Refusal.NOT_FOUND),
        (errors.UnknownMethodError("x"), Refusal.NOT_FOUND),
        (errors.NotServingError("x"), Refusal.NOT_SERVING),
        (errors.SlowReaderError("x"), None),
        (RuntimeError("x"), None),
    ],
)
def test_each_refusal_has_one_word(error: Exception, refusal: Refusal | None) -> None:
    assert refusal_of(error) is refusal
    tally = Tally()
    tell_refusal([tally], error)
    assert dict(tally.refused) == ({refusal: 1} if refusal else {})


@pytest.mark.parametrize(
    ("error", "seconds_left", "why"),
    [
        (None, None, Unfinished.CANCELLED),
        (None, 3.0, Unfinished.CANCELLED),
        (None, -0.1, Unfinished.DEADLINE),
        (errors.SlowReaderError("x"), None, Unfinished.SLOW_READER),
        (errors.PolicyRefusedError("x", "rule"), None, Unfinished.POLICY_REFUSED),
        (errors.NotServingError("x"), -1.0, Unfinished.SHUTDOWN),
        (errors.DeadlineTooShortError("x"), 3.0, Unfinished.DEADLINE),
        (OSError("x"), None, Unfinished.FAILED),
    ],
)
def test_each_chat_that_does_not_finish_has_one_word(
    error: Exception | None, seconds_left: float | None, why: Unfinished
) -> None:
    assert unfinished_by(error, seconds_left) is why
    assert len(CHAT_OUTCOMES) == len(set(CHAT_OUTCOMES)) == len(FinishReason) + len(Unfinished)


def ended(first: float, num_tokens: int, decode_seconds: float) -> ChatEnd:
    finished = Finished(
        reason=FinishReason.LENGTH,
        prompt_tokens=9,
        cached_prompt_tokens=0,
        completion_tokens=num_tokens,
        queue_seconds=0.0,
        prefill_seconds=0.1,
        time_to_first_token_seconds=first,
        decode_seconds=decode_seconds,
    )
    return ChatEnd(model="m", role="user", why=finished.reason, finished=finished)


def test_speeds_are_those_of_the_last_minutes() -> None:
    now = 0.0
    tally = Tally(clock=lambda: now)
    assert tally.speeds() == Speeds()
    tally.chat_ended(ended(9.0, 11, 10.0))
    now = 200.0
    tally.chat_ended(ended(1.0, 11, 1.0))
    tally.chat_ended(ended(2.0, 11, 2.0))
    tally.chat_ended(ended(0.5, 1, 0.0))
    tally.chat_ended(ended(0.0, 0, 0.0))
    tally.chat_ended(ChatEnd(model="m", role="user", why=Unfinished.CANCELLED, finished=None))
    assert tally.speeds() == Speeds(4, 1.5, 9.0, 5.0)
    now = 301.0
    assert tally.speeds() == Speeds(3, 1.0, 2.0, 7.5)
    now = 600.0
    assert tally.speeds() == Speeds()
