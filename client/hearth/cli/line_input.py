"""What a person types, as whole turns: lines that go on, and blocks between triple quotes.

Knows nothing of terminals; it is given the function that reads a line. Called by `chat`.
"""

from collections.abc import Callable

PROMPT = "> "
MORE = ". "
_QUOTES = '"""'


def read_turn(read_line: Callable[[str], str]) -> str:
    """Read one turn. `read_line` gets the prompt; what it raises (EOFError, KeyboardInterrupt) passes through."""
    line = read_line(PROMPT)
    if line.lstrip().startswith(_QUOTES):
        return _read_block(line.lstrip().removeprefix(_QUOTES), read_line)
    lines = []
    while _goes_on(line):
        lines.append(line[:-1])
        line = read_line(MORE)
    return "\n".join([*lines, line])


def _read_block(line: str, read_line: Callable[[str], str]) -> str:
    lines = []
    while not line.rstrip().endswith(_QUOTES):
        lines.append(line)
        line = read_line(MORE)
    lines.append(line.rstrip().removesuffix(_QUOTES))
    # The lines of the quotes themselves are part of the text only if something stands on them.
    return "\n".join(lines).removeprefix("\n").removesuffix("\n")


def _goes_on(line: str) -> bool:
    """Whether the line ends in a backslash that no backslash before it makes an ordinary one."""
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1
