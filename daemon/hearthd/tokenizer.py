"""Text to token ids and back."""

from hearthd.chat_template import Message, Role

__all__ = ["Message", "Role"]
