"""A conversation's token ids, as the owner's policy has it. Called by `chat` and `model`."""

from collections.abc import Callable

from hearthd.audit.audit import current_record
from hearthd.inference.model import Model
from hearthd.policy.rules import RoleRules
from hearthd.text.chat_template import Message

__all__ = ["encoding", "encoding_with_beginning"]


def encoding(model: Model, rules: RoleRules, messages: tuple[Message, ...]) -> Callable[[], list[int]]:
    """Return what makes token ids of a conversation, as the policy has it, in another thread."""
    fired = current_record().rules
    return lambda: model.tokenizer.encode_chat(rules.apply(messages, fired))


def encoding_with_beginning(
    model: Model, rules: RoleRules, messages: tuple[Message, ...]
) -> Callable[[], tuple[list[int], int]]:
    """Return the same, which also says how many of them stand for the system message."""
    fired = current_record().rules

    def encode() -> tuple[list[int], int]:
        applied = rules.apply(messages, fired)
        prompt_ids = model.tokenizer.encode_chat(applied)
        return prompt_ids, model.tokenizer.count_beginning(applied, prompt_ids)

    return encode
