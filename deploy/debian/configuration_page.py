"""hearthd.toml(5), made from deploy/hearthd.toml: each section, each key with its default, and what stands above it.

The file's own form is all that this knows: comments above `#key = value` below `[section]`. Called by `documents`.
"""

import re
from datetime import UTC, datetime

from closing_text import escape

__all__ = ["configuration_page"]

_SECTION = re.compile(r"#?(\[[A-Za-z0-9_.]+\])")
_KEY = re.compile(r"#?([a-z0-9_]+ = .*)")


def configuration_page(text: str, version: str, epoch: int) -> str:
    """Return the man page of the documented configuration."""
    date = datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%d")
    lines = [
        f'.TH HEARTHD.TOML 5 "{date}" "Hearth {version}" "Hearth"',
        ".SH NAME",
        "hearthd.toml \\- configuration of hearthd, the daemon of the chat model that lives in the house",
        ".SH SYNOPSIS",
        ".I /etc/hearth/hearthd.toml",
        ".SH DESCRIPTION",
    ]
    comment: list[str] = []

    def flush() -> None:
        lines.extend(escape(line) if line else ".PP" for line in comment)
        comment.clear()

    for line in text.splitlines():
        if section := _SECTION.fullmatch(line):
            flush()
            lines += [f".SH {escape(section[1])}"]
        elif key := _KEY.fullmatch(line):
            lines += [".TP", f".B {escape(key[1])}"]
            flush()
        elif line.startswith("#"):
            comment.append(line.removeprefix("#").strip())
        elif comment:
            # A paragraph that belongs to no key.
            lines.append(".PP")
            flush()
    flush()
    lines += [".SH SEE ALSO", ".BR hearthd (8)"]
    return "\n".join(lines) + "\n"
