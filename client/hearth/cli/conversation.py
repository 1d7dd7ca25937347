"""A conversation that a person holds: what was said so far, and how it is kept in a file.

Pure state; knows neither the terminal nor the daemon. Called by `chat`.
"""

import json
import os
from pathlib import Path

from hearth._values import Message


class Conversation:
    """System message and turns, oldest first; a question is kept only together with its answer."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self._turns: list[Message] = []
        self._saved: set[Path] = set()

    @property
    def num_exchanges(self) -> int:
        """Questions with their answers."""
        return len(self._turns) // 2

    @property
    def messages(self) -> list[Message]:
        """All that was said, the system message first."""
        return [*([] if self.system is None else [Message("system", self.system)]), *self._turns]

    def with_question(self, question: str) -> list[Message]:
        """What the daemon is asked; nothing is kept yet."""
        return [*self.messages, Message("user", question)]

    def keep(self, question: str, answer: str) -> None:
        """Add an exchange."""
        self._turns += [Message("user", question), Message("assistant", answer)]

    def forget(self, num_exchanges: int) -> int:
        """Drop the oldest exchanges. Returns how many there were to drop."""
        dropped = min(num_exchanges, self.num_exchanges)
        del self._turns[: 2 * dropped]
        return dropped

    def save(self, path: Path) -> None:
        """Write all to `path`: JSON if its name ends so, else text.

        Replaces only a file that this conversation saved before; FileExistsError on another one.
        """
        path = path.absolute()
        text = self._as_json() if path.suffix == ".json" else self._as_text()
        is_new = path not in self._saved
        if is_new:
            # Takes the name, if nobody has it.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        # Whole or not at all, also on a full disk. What was said is nobody else's to read.
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with os.fdopen(
                os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8"
            ) as file:
                file.write(text)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            if is_new:
                path.unlink(missing_ok=True)
            raise
        self._saved.add(path)

    def _as_json(self) -> str:
        messages = [{"role": message.role, "content": message.content} for message in self.messages]
        return json.dumps({"messages": messages}, ensure_ascii=False, indent=2) + "\n"

    def _as_text(self) -> str:
        return "\n".join(f"## {message.role}\n\n{message.content}\n" for message in self.messages)
