"""Sections of a man page from what stands below the options in `--help`: examples, exit status and the like.

argparse-manpage makes one filled paragraph of it, and leaves out the subcommands'. The text's form is all that this
knows: a line without indentation that ends in a colon is a heading; below it, `  NAME   meaning` is an entry, which
goes on where lines are indented further; under `examples:` every line stands for itself. Called by `documents`.
"""

import re
from collections.abc import Iterator
from textwrap import dedent

__all__ = ["closing_sections", "escape"]

_ENTRY = re.compile(r"  (\S+(?: \S+)*) {2,}(\S.*)")
# What a page has no need to say: it is the page.
_REFERENCE = re.compile(r".*: \w+ --help")


def closing_sections(text: str, command: str = "") -> str:
    """Return the text as sections; `command` is the subcommand that it is about, if it is about one."""
    about = rf" \fI\,'{escape(command)}'\/\fR" if command else ""
    lines: list[str] = []
    for heading, content in _split(text):
        lines.append(f".SH {(heading or 'notes').upper()}{about}")
        lines += ["", ".EX", *map(escape, content), ".EE"] if heading == "examples" else _entries(content)
    return "".join(f"{line}\n" for line in lines)


def _split(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each heading, or none, with the lines below it."""
    heading, content = "", list[str]()
    for line in [*text.splitlines(), "end:"]:
        if re.fullmatch(r"\S.*:", line):
            below = dedent("\n".join(content)).strip("\n") if heading == "examples" else "\n".join(content).strip("\n")
            if below:
                yield heading, below.splitlines()
            heading, content = line.removesuffix(":"), []
        elif not _REFERENCE.fullmatch(line):
            content.append(line)


def _entries(content: list[str]) -> list[str]:
    lines: list[str] = []
    after_entry = False
    for line in content:
        if entry := _ENTRY.fullmatch(line):
            lines += [".TP", f".B {escape(entry[1])}", escape(entry[2])]
            after_entry = True
        elif not line.strip():
            lines.append(".PP")
        else:
            if after_entry and not line.startswith("   ") and lines[-1] != ".PP":
                lines.append(".PP")
            lines.append(escape(line.strip()))
            after_entry = after_entry and line.startswith("   ")
    return lines


def escape(text: str) -> str:
    """Return text that roff prints as it is."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq")  # a macro's words may be quoted
    return f"\\&{text}" if text.startswith((".", "'")) else text
