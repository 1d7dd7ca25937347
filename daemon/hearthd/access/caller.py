"""Who makes a call, as the server itself has verified it: a name, a role, and what the role may do.

`auth` finds it out and sets it before anything of the request is read; whoever serves the call, or writes about it,
asks `current_caller`. Knows no gRPC and no credential.
"""

import contextvars
from dataclasses import dataclass, field
from typing import Final

from hearthd.configuration.roles import Role
from hearthd.errors import NotPermittedError
from hearthd.priority import Priority

__all__ = ["Caller", "current_caller", "set_caller"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who may call."""

    name: str
    """Of the token or the certificate; `-` for whoever needs none."""
    role: str
    account: str
    """What rates and quotas count by. It stays when the token is made anew under its name."""
    identity: str
    """What KV is shared by: no two callers that can be told apart have the same."""
    rights: Role = field(repr=False)

    def require_model(self, name: str) -> None:
        """Raise NotPermittedError if the role may not use a model, whether or not there is one of that name."""
        if not self.rights.may_use(name):
            raise NotPermittedError(
                f"role {self.role} may not use that model; it may use {', '.join(self.rights.models)}"
            )

    def choose_priority(self, asked: Priority | None) -> Priority:
        """Return the priority of a request that asks for one, or for none. Raises NotPermittedError."""
        priority = self.rights.priority(asked)
        if priority is None and asked is not None:
            raise NotPermittedError(
                f"role {self.role} may not ask for priority {asked.word}; the most urgent one that it may ask for is "
                f"{self.rights.max_priority}"
            )
        assert priority is not None
        return priority

    def choose_max_tokens(self, max_tokens: int, *, is_asked: bool) -> int:
        """Return the most tokens of an answer, of what a request asks for or gets by default.

        Raises NotPermittedError if it asks for more than the role may: what was asked for is never cut short silently.
        """
        most = self.rights.max_tokens or max_tokens
        if is_asked and max_tokens > most:
            raise NotPermittedError(
                f"role {self.role} may ask for at most {most} tokens of an answer (max_tokens of the role), and "
                f"sampling.max_tokens is {max_tokens}; give {most} or less, or leave it out"
            )
        return min(max_tokens, most)

    def require_prompt(self, num_tokens: int) -> None:
        """Raise NotPermittedError if the role may not send a prompt of so many tokens."""
        most = self.rights.max_prompt_tokens
        if most and num_tokens > most:
            raise NotPermittedError(
                f"role {self.role} may send at most {most} tokens of prompt (max_prompt_tokens of the role), and this "
                f"one has {num_tokens}; send fewer or shorter messages"
            )


# Set for one call: gRPC runs interceptors and handler of a call in one task, and each call in a task of its own.
_current: Final[contextvars.ContextVar[Caller]] = contextvars.ContextVar("caller")


def set_caller(caller: Caller) -> None:
    """Say who makes the call that this task serves."""
    _current.set(caller)


def current_caller() -> Caller:
    """Return who makes the call that this task serves. Raises LookupError outside of a call."""
    return _current.get()
