"""What a policy says, as values, and what of it concerns a role.

Knows no file. Made by `policy_file`; `services` screens conversations with it, and gives `engine` the screen of an
answer.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from hearthd.errors import ConfigError, InvalidRequestError, PolicyRefusedError
from hearthd.policy.screening import PhraseRule, RuleSet, Screen
from hearthd.text.chat_template import Message

__all__ = ["Policy", "RoleRules", "Scope", "SystemPrompt"]

# Tokens that instructions must leave to question and answer.
_MIN_ROOM: Final = 32


@dataclass(frozen=True, slots=True)
class Scope:
    """Whom something concerns."""

    roles: frozenset[str] | None = None
    """None: everybody."""

    def has(self, role: str) -> bool:
        """Whether it concerns callers of a role."""
        return self.roles is None or role in self.roles


@dataclass(frozen=True, slots=True)
class SystemPrompt:
    """Instructions before the caller's own."""

    text: str
    allows_own: bool
    """Whether a caller may add a system message."""


class RoleRules:
    """What holds for the callers of one role. Safe to use from any thread."""

    def __init__(
        self, prompts: Sequence[SystemPrompt], on_input: Sequence[PhraseRule], on_output: Sequence[PhraseRule]
    ) -> None:
        self._prompts = tuple(prompts)
        self._blocked_input = RuleSet(rule for rule in on_input if not rule.is_required)
        self._required_input = RuleSet(rule for rule in on_input if rule.is_required)
        self._output = RuleSet(on_output) if on_output else None

    @property
    def has_output_rules(self) -> bool:
        """Whether answers are screened."""
        return self._output is not None

    def screen_answer(self) -> Screen | None:
        """Return the screen for one answer; None if none is needed."""
        return None if self._output is None else Screen(self._output)

    def add_prompt(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Return the conversation behind the owner's instructions. Raises PolicyRefusedError."""
        if not self._prompts:
            return tuple(messages)
        texts = [prompt.text for prompt in self._prompts]
        own = messages[0].content if messages and messages[0].role == "system" else None
        if own is None:
            return (Message("system", "\n\n".join(texts)), *messages)
        if not all(prompt.allows_own for prompt in self._prompts):
            raise PolicyRefusedError("the policy of this daemon allows no system message; leave it out", "system")
        return (Message("system", "\n\n".join([*texts, own])), *messages[1:])

    def apply(self, messages: Sequence[Message], fired: set[str]) -> tuple[Message, ...]:
        """Return the conversation as the model gets it. fired: takes the names of the rules that applied.

        Raises PolicyRefusedError.
        """
        screened = []
        for place, message in enumerate(messages):
            content = message.content
            for rules in (self._blocked_input, self._required_input):
                is_last_of_user = place == len(messages) - 1 and message.role == "user"
                if rules.rules and (rules is self._blocked_input or is_last_of_user):
                    screen = Screen(rules)
                    try:
                        content = screen.push(content) + screen.flush()
                    finally:
                        fired |= screen.fired
            screened.append(Message(message.role, content))
        try:
            return self.add_prompt(screened)
        except PolicyRefusedError as error:
            fired.add(error.rule)
            raise


class Policy:
    """A whole policy file. One without anything allows everything."""

    def __init__(
        self,
        prompts: Sequence[tuple[SystemPrompt, Scope]] = (),
        input_rules: Sequence[tuple[PhraseRule, Scope]] = (),
        output_rules: Sequence[tuple[PhraseRule, Scope]] = (),
    ) -> None:
        self._prompts = tuple(prompts)
        self._input_rules = tuple(input_rules)
        self._output_rules = tuple(output_rules)
        # Compiled once for each role that calls; few are configured.
        self.for_role = functools.lru_cache(maxsize=64)(self._for_role)

    @property
    def roles(self) -> frozenset[str]:
        """The roles that it names."""
        scopes = [scope for _, scope in (*self._prompts, *self._input_rules, *self._output_rules)]
        return frozenset().union(*(scope.roles for scope in scopes if scope.roles))

    def check_prompts(self, count_tokens: Callable[[Sequence[Message]], int], context_length: int) -> None:
        """Raise ConfigError if the instructions of a role are more than the model takes, or of a kind that it refuses.

        count_tokens: of a conversation as the model gets it; raises InvalidRequestError.
        """
        hello = (Message("user", "Hello"),)
        # Whatever other roles there are, they get what a role without a name would get.
        for role in sorted({*self.roles, ""}):
            prompted = self.for_role(role).add_prompt(hello)
            if prompted == hello:
                continue
            try:
                num_tokens = count_tokens(prompted)
            except InvalidRequestError as error:
                raise ConfigError(
                    f"the model does not take the policy's system prompt: {error.message}; leave [[system]] out"
                ) from None
            if num_tokens + _MIN_ROOM > context_length:
                raise ConfigError(
                    f"the policy's system prompt makes {num_tokens} tokens of a greeting; give at most "
                    f"{context_length - _MIN_ROOM}, which leaves room in engine.context_length, {context_length}"
                )

    def _for_role(self, role: str) -> RoleRules:
        return RoleRules(
            [prompt for prompt, scope in self._prompts if scope.has(role)],
            [rule for rule, scope in self._input_rules if scope.has(role)],
            [rule for rule, scope in self._output_rules if scope.has(role)],
        )
