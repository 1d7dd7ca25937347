"""A conversation's token ids, as the owner's policy has it. Called by `chat` and `model`."""

from collections.abc import Callable

from hearthd.audit import current_record
from hearthd.chat_template import Message
from hearthd.model import Model
from hearthd.policy.rules import RoleRules

__all__ = ["encoding"]


def encoding(model: Model, rules: RoleRules, messages: tuple[Message, ...]) -> Callable[[], list[int]]:
    """Return what makes token ids of a conversation, as the policy has it, in another thread."""
    fired = current_record().rules
    return lambda: model.tokenizer.encode_chat(rules.apply(messages, fired))
