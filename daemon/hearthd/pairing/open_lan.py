"""`hearthd pair --open-lan`: the lines of hearthd.toml that let other machines call, with TLS and tokens.

Changes single lines of the file and leaves the rest, comments too, as it is; what would not come to exactly what was
meant is refused, and planned apart from written: a daemon that finds the lines must find a certificate, too. Called by
`pairing.cli`.
"""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hearthd.configuration import paths
from hearthd.configuration.config import Config, load_config
from hearthd.durable_file import replace_file
from hearthd.errors import ConfigError

__all__ = ["PlannedFile", "by_hand", "missing_lines", "plan_open_lan"]

_EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 - what --open-lan is for


def missing_lines(config: Config, *, is_exposed: bool) -> dict[tuple[str, str], str]:
    """Return what the configuration lacks for devices of the house, (section, key) to value in TOML."""
    lines = {}
    if not is_exposed:
        lines["server", "tcp"] = f'["{_EVERYWHERE}:{_port(config)}"]'
    if not config.tls.is_configured:
        lines["tls", "directory"] = '"auto"'
    if config.auth.token_file is None:
        lines["auth", "token_file"] = '"auto"'
    return lines


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """hearthd.toml as it shall be."""

    config: Config
    """What it will come to."""
    _file: Path
    _text: str

    def write(self) -> None:
        """Let it take the file's place, which is made if it is missing. Raises ConfigError if it cannot be written."""
        try:
            self._file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            # Whoever could read it still can: the service is another user.
            mode = self._file.stat().st_mode & 0o777 if self._file.exists() else 0o644
            replace_file(self._file, self._text.encode(), mode=mode)
        except OSError as error:
            raise ConfigError(f"{self._file} cannot be written: {error.strerror}; run this as root") from None


def plan_open_lan(file: Path, lines: Mapping[tuple[str, str], str]) -> PlannedFile:
    """Put the lines into the file's text, and prove what that comes to. Writes nothing.

    Raises ConfigError if the file cannot be read, or something stands above it.
    """
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}; run this as root") from None
    for (section, key), value in lines.items():
        text = _with_line(text, section, key, value)
    return PlannedFile(_read_back(text, file, lines), file, text)


def _port(config: Config) -> str:
    ports = {address.rpartition(":")[2] for address in config.server.tcp} - {"0"}
    return ports.pop() if len(ports) == 1 else "50051"


def _with_line(text: str, section: str, key: str, value: str) -> str:
    """Set a key: in place of the line that sets it, else below the comment that shows it, else below the header."""
    lines = text.splitlines()
    header = next((at for at, line in enumerate(lines) if re.fullmatch(rf"\s*\[{section}\]\s*(#.*)?", line)), None)
    if header is None:
        return "\n".join([*lines, *([""] if lines else []), f"[{section}]", f"{key} = {value}", ""])
    following = range(header + 1, len(lines))
    end = next((at for at in following if re.match(r"\s*\[", lines[at])), len(lines))
    new = f"{key} = {value}"
    for pattern, is_replaced in ((rf"\s*{key}\s*=", True), (rf"#\s*{key}\s*=", False)):
        for at in range(header + 1, end):
            if re.match(pattern, lines[at]):
                lines[at : at + 1] = [new] if is_replaced else [lines[at], new]
                return "\n".join([*lines, ""])
    lines.insert(header + 1, new)
    return "\n".join([*lines, ""])


def _read_back(text: str, file: Path, lines: Mapping[tuple[str, str], str]) -> Config:
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as trial:
        trial.write(text)
        trial.flush()
        try:
            config = load_config(Path(trial.name))
        except ConfigError as error:
            raise ConfigError(
                f"{file} could not be changed ({str(error).replace(trial.name, str(file))}); {by_hand(lines)}"
            ) from None
    wanted: dict[tuple[str, str], object] = {
        ("server", "tcp"): (lines.get(("server", "tcp"), "").strip('[]"'),),
        ("tls", "directory"): paths.tls_directory(),
        ("auth", "token_file"): paths.token_file(),
    }
    for section, key in lines:
        if getattr(getattr(config, section), key) != wanted[section, key]:
            raise ConfigError(
                f"{section}.{key} does not come from {file}: HEARTHD_{section.upper()}_{key.upper()} is set in the "
                f"environment, or the file has the key in a form that was not understood; {by_hand(lines)}"
            )
    return config


def by_hand(lines: Mapping[tuple[str, str], str]) -> str:
    """Say which lines to write."""
    return "write " + ", ".join(f"[{section}] {key} = {value}" for (section, key), value in lines.items())
