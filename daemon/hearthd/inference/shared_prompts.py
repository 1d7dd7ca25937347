"""Beginnings of prompts that the owner shares: the policy's instructions, and system prompts in files.

Each as the model gets it from a caller of every role, since instructions may stand before it; and for callers of those
roles alone from whom the model gets it so. Knows no KV. Called by `model`, and by `__main__` to check a configuration.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from hearthd.configuration.config import Config
from hearthd.errors import ConfigError, InvalidRequestError, PolicyRefusedError
from hearthd.kv.shared import EVERYBODY_ELSE, SharedPrompts
from hearthd.policy.policy_file import PolicyFile
from hearthd.policy.rules import RoleRules
from hearthd.text.chat_template import Message
from hearthd.text.tokenizer import ChatTokenizer

__all__ = ["encode_shared_prompts", "read_shared_prompts"]

_MAX_BYTES: Final = 2**20
_USER: Final = Message("user", "A")


def read_shared_prompts(config: Config) -> list[str]:
    """Return the texts of `cache.shared_prompts`. Raises ConfigError: one line with the file and what is wrong."""
    return [_read(Path(name)) for name in config.cache.shared_prompts]


def encode_shared_prompts(config: Config, tokenizer: ChatTokenizer) -> SharedPrompts:
    """Return what is shared, by role. Raises ConfigError as `read_shared_prompts`, and the policy."""
    texts = read_shared_prompts(config)
    policy = PolicyFile(config.policy.file, config.roles).current
    # Whatever other roles there are, they get what a role without a name would get.
    roles = sorted({*policy.roles, EVERYBODY_ELSE})
    return SharedPrompts({role: _encode(_first_messages(policy.for_role(role), texts), tokenizer) for role in roles})


def _encode(first_messages: Iterable[Message], tokenizer: ChatTokenizer) -> list[list[int]]:
    found: dict[tuple[int, ...], None] = {}
    for first in first_messages:
        try:
            found[tuple(tokenizer.encode_beginning(first))] = None
        except InvalidRequestError:  # this model takes no system message
            continue
    return [list(each) for each in found]


def _first_messages(rules: RoleRules, texts: list[str]) -> Iterator[Message]:
    """Yield the system messages that the model gets from callers of a role, with none of their own and with these."""
    yield from rules.add_prompt([_USER])[:-1]
    for text in texts:
        with suppress(PolicyRefusedError):  # callers of this role may have no system message, or not this one
            yield rules.apply([Message("system", text)], set())[0]


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        text = data.decode().strip()
    except OSError as error:
        raise ConfigError(f"cache.shared_prompts: {path} cannot be read: {error.strerror}; name a text file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"cache.shared_prompts: {path} is not UTF-8; save it as such") from None
    if not text or len(data) > _MAX_BYTES:
        raise ConfigError(f"cache.shared_prompts: {path} is empty or has more than {_MAX_BYTES} bytes")
    return text
