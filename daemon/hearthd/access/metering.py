"""What each caller has used of its role's limits, and who has to wait.

Calls in a minute, tokens in a minute, tokens in a day, chats at once: each is of one caller's own, by its account.
Tokens are charged as they come, prompts with their slot and answers token by token, so that a crash forgets none that
was charged before the last save. A chat begins while something is left and is finished then, whatever it costs; the
next one waits until the debt is paid.

Knows no gRPC and no model. `auth` counts calls, `services` admits chats.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from hearthd.access.caller import Caller
from hearthd.access.daily_usage import DailyUsage
from hearthd.access.token_bucket import TokenBucket
from hearthd.errors import QuotaExceededError

__all__ = ["ChatMeter", "Meters"]

# A chat ends when it ends; whoever has too many is told to look again after this long.
_CONCURRENCY_RETRY_SECONDS: Final = 1.0


class _Account:
    """One caller's books."""

    __slots__ = ("calls", "num_chats", "tokens")

    def __init__(self) -> None:
        self.calls: TokenBucket | None = None
        self.tokens: TokenBucket | None = None
        self.num_chats = 0


class Meters:
    """The books of all callers. Of the event loop.

    There are as many accounts as tokens and certificates were ever configured since the start, and one for all others.
    """

    def __init__(self, daily: DailyUsage, clock: Callable[[], float] = time.monotonic) -> None:
        self._daily = daily
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def count_request(self, caller: Caller) -> None:
        """Count a call. Raises QuotaExceededError if it is one too many for this minute."""
        limit = caller.rights.requests_per_minute
        if not limit:
            return
        account, now = self._account(caller), self._clock()
        account.calls = bucket = _bucket(account.calls, limit, now)
        if seconds := bucket.seconds_until(1, now):
            raise _exceeded(
                caller, "requests_per_minute", limit, f"{caller.name} has made its {limit} calls of a minute", seconds
            )
        bucket.take(1, now)

    def admit_chat(self, caller: Caller) -> "ChatMeter":
        """Let a chat begin. Raises QuotaExceededError if the caller has used up one of its limits."""
        rights, account, now = caller.rights, self._account(caller), self._clock()
        if (limit := rights.max_concurrent_chats) and account.num_chats >= limit:
            raise _exceeded(
                caller,
                "max_concurrent_chats",
                limit,
                f"{caller.name} has {account.num_chats} chats at once, the most that it may",
                _CONCURRENCY_RETRY_SECONDS,
            )
        if limit := rights.tokens_per_minute:
            account.tokens = bucket = _bucket(account.tokens, limit, now)
            if seconds := bucket.seconds_until(1, now):
                raise _exceeded(
                    caller,
                    "tokens_per_minute",
                    limit,
                    f"{caller.name} has used its {limit} tokens of a minute",
                    seconds,
                )
        if (limit := rights.tokens_per_day) and self._daily.used(caller.account) >= limit:
            raise _exceeded(
                caller,
                "tokens_per_day",
                limit,
                f"{caller.name} has used its {limit} tokens of today",
                self._daily.seconds_left(),
            )
        account.num_chats += 1
        return ChatMeter(lambda num_tokens: self._charge(caller, num_tokens), lambda: self._leave(account))

    def _charge(self, caller: Caller, num_tokens: int) -> None:
        account, now = self._account(caller), self._clock()
        if limit := caller.rights.tokens_per_minute:
            account.tokens = _bucket(account.tokens, limit, now)
            account.tokens.take(num_tokens, now)
        if caller.rights.tokens_per_day:
            self._daily.add(caller.account, num_tokens)

    @staticmethod
    def _leave(account: _Account) -> None:
        account.num_chats -= 1

    def _account(self, caller: Caller) -> _Account:
        return self._accounts.setdefault(caller.account, _Account())


class ChatMeter:
    """One chat's own. Leaving its `with` block ends it for the count of chats at once."""

    def __init__(self, charge: Callable[[int], None], leave: Callable[[], None]) -> None:
        self._charge = charge
        self._leave = leave
        self._num_charged = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def charge_up_to(self, num_tokens: int) -> None:
        """Charge what the chat has cost so far, less what was charged before."""
        if num_tokens > self._num_charged:
            self._charge(num_tokens - self._num_charged)
            self._num_charged = num_tokens


def _bucket(bucket: TokenBucket | None, per_minute: int, now: float) -> TokenBucket:
    """Return the bucket, or a new one where there is none or the configuration has another rate now."""
    return bucket if bucket is not None and bucket.per_minute == per_minute else TokenBucket(per_minute, now)


def _exceeded(caller: Caller, key: str, limit: int, message: str, seconds: float) -> QuotaExceededError:
    return QuotaExceededError(
        caller.name,
        f"{key} = {limit} of role {caller.role}",
        f"{message} ({key} of role {caller.role}); try again in {_plain(seconds)}",
        seconds,
    )


def _plain(seconds: float) -> str:
    """Return a time as people say it, rounded up."""
    for unit, length in (("hour", 3600), ("minute", 60)):
        if seconds > length:
            count = -int(-seconds // length)
            return f"{count} {unit}{'s' if count != 1 else ''}"
    count = max(-int(-seconds // 1), 1)
    return f"{count} second{'s' if count != 1 else ''}"
