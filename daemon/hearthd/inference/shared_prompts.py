"""Beginnings of prompts that the owner shares with all callers: the policy's instructions, and system prompts in files.

Each as the model gets it from a caller of every role, since instructions may stand before it. Knows no KV. Called by
`model`, and by `__main__` to check a configuration.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from hearthd.configuration.config import Config
from hearthd.errors import ConfigError, InvalidRequestError, PolicyRefusedError
from hearthd.policy.policy_file import PolicyFile
from hearthd.text.chat_template import Message
from hearthd.text.tokenizer import ChatTokenizer

__all__ = ["encode_shared_prompts", "read_shared_prompts"]

_MAX_BYTES: Final = 2**20
_USER: Final = Message("user", "A")


def read_shared_prompts(config: Config) -> list[str]:
    """Return the texts of `cache.shared_prompts`. Raises ConfigError: one line with the file and what is wrong."""
    return [_read(Path(name)) for name in config.cache.shared_prompts]


def encode_shared_prompts(config: Config, tokenizer: ChatTokenizer) -> list[list[int]]:
    """Return what is shared, as token ids, each once. Raises ConfigError as `read_shared_prompts`, and the policy."""
    texts = read_shared_prompts(config)
    found: dict[tuple[int, ...], None] = {}
    for first in _first_messages(config, texts):
        try:
            found[tuple(tokenizer.encode_beginning(first))] = None
        except InvalidRequestError:  # this model takes no system message
            continue
    return [list(each) for each in found]


def _first_messages(config: Config, texts: list[str]) -> Iterator[Message]:
    policy = PolicyFile(config.policy.file, config.roles).current
    # Whatever other roles there are, they get what a role without a name would get.
    for role in sorted({*policy.roles, ""}):
        rules = policy.for_role(role)
        for messages in ([_USER], *([Message("system", text), _USER] for text in texts)):
            try:
                first = rules.add_prompt(messages)[0]
            except PolicyRefusedError:  # callers of this role may have no system message
                continue
            if first.role == "system":
                yield first


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
