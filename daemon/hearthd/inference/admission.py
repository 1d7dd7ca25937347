"""Who finds the queue full, who gives way to whom, and when to come again.

Chats that are less urgent do not count: a queue that is full of them keeps nobody else out. So there are at most as
many times the limit of chats as there are priorities. A flood of one account fills the queue until others come: then
its last ones give way, one for one, until it has no more than they have, or one more.

Knows no engine. Called by `worker`.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Final

from hearthd.inference.stream import ChatStream
from hearthd.priority import Priority

__all__ = ["last_of_longest", "retry_seconds", "rivals_of"]

# Bounds of what a refused caller is told to wait.
_MIN_RETRY_SECONDS: Final = 1.0
_MAX_RETRY_SECONDS: Final = 60.0


def rivals_of(priority: Priority, chats: Iterable[ChatStream]) -> list[ChatStream]:
    """Return the chats that count for the limit of a new one. chats: in the order in which they have come."""
    return [chat for chat in chats if chat.priority <= priority and not chat.has_ended]


def last_of_longest(rivals: list[ChatStream], priority: Priority, account: str) -> ChatStream | None:
    """Return the chat that gives its place to a new one: the last that waits of the account that has most here.

    Only one that is no more urgent than the new one. None if its account has not two more than the new one's.
    """
    num_chats = Counter(chat.account for chat in rivals)
    waiting = [
        chat
        for chat in rivals
        if not chat.has_begun and chat.priority >= priority and num_chats[chat.account] >= num_chats[account] + 2
    ]
    return max(reversed(waiting), key=lambda chat: num_chats[chat.account], default=None)


def retry_seconds(until_end: float | None) -> float:
    """Return when to come again: when the next of those that run has ended."""
    return min(max(until_end or 0.0, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS)
