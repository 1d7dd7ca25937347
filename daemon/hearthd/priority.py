"""How urgent a request is. The words are those of hearthd.toml and of `hearth ask --priority`."""

import enum

__all__ = ["Priority"]


class Priority(enum.IntEnum):
    """The smaller, the more urgent. A more urgent request that waits pauses a less urgent one that runs."""

    INTERACTIVE = 0
    """Somebody is listening."""
    NORMAL = 1
    BACKGROUND = 2
    """Nobody waits for it: it runs while nothing else does."""

    @property
    def word(self) -> str:
        """Its name in configuration and messages."""
        return self.name.lower()

    @classmethod
    def of(cls, word: str) -> "Priority":
        """Return the one of that name."""
        return cls[word.upper()]
