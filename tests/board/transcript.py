"""What a run leaves to read: one file with every command, its output and what was found, and the board's console.

Called by `machine` and `scenario`.
"""

from pathlib import Path

__all__ = ["Transcript"]


class Transcript:
    """Two files, begun anew; written through at once, so that a run that hangs can be watched."""

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{name}.txt"
        self.console = directory / f"{name}.console"
        self.path.write_text("", encoding="utf-8")
        self.console.write_bytes(b"")

    def heading(self, text: str) -> None:
        """Begin a step."""
        self._write(f"\n=== {text}\n\n")

    def note(self, text: str) -> None:
        """Write what was found or done."""
        self._write(f"--- {text}\n")

    def command(self, who: str, command: str, output: str, exit_code: int | None, seconds: float) -> None:
        """Write a command with what came of it."""
        code = "out of time" if exit_code is None else f"exit code {exit_code}"
        ending = "" if not output or output.endswith("\n") else "\n"
        self._write(f"{who}$ {command}\n{output}{ending}[{code}, {seconds:.1f} s]\n")

    def _write(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
