"""The `hearth` program: parses the command line, runs one command, and turns whatever happens into an exit code.

Exit codes: 0 success, 1 an error, 2 wrong usage that the program sees by itself, 130 interrupted, 141 whoever read the
output is gone. An error is one line on stderr. gRPC is imported only when a command needs a daemon, so that
`hearth --help` is quick on a board.
"""

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from hearth._errors import AuthenticationError, ConfigurationError, HearthError
from hearth.cli.arguments import make_parser
from hearth.cli.terminal import neutralise_line

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

# What the daemon adds for programmers.
_PROGRAMMERS_REMEDY = ": send the metadata"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Returns its exit code; argparse raises SystemExit after --help and on wrong usage."""
    _open_standard_streams()
    # A program's log, unlike a library's, is its own to silence: gRPC's would stand between an answer's lines. gRPC
    # reads this when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    command = ""
    try:
        arguments = _parse(argv)
        command = arguments.command
        # `ask` is the module hearth.cli.ask, and so on: one command, one module.
        code: int = import_module(f"hearth.cli.{command}").run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return EXIT_BROKEN_PIPE
    except ConfigurationError as error:
        _report(error)
        return EXIT_USAGE
    except AuthenticationError as error:
        _report(error if command == "pair" else _with_options(error))
        return EXIT_ERROR
    except HearthError as error:
        _report(error)
        return EXIT_ERROR
    except OSError as error:
        _drop_output()
        # What a write to an open file raises names none.
        is_output = error.errno in (errno.ENOSPC, errno.EDQUOT) and not error.filename
        _report(HearthError(f"the output cannot be written: {error.strerror}") if is_output else error)
        return EXIT_ERROR
    return code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    try:
        return make_parser().parse_args(argv)
    except SystemExit:
        # The text of --help may still be on its way, to where it cannot be written.
        sys.stdout.flush()
        raise


def _with_options(error: AuthenticationError) -> HearthError:
    """Say with this program's own options what helps; a paired device has been told what does, and so may others be."""
    said, remedy, _ = str(error).partition(_PROGRAMMERS_REMEDY)
    if not remedy or "hearth pair" in said:
        return error
    return AuthenticationError(
        f"{said}: give --token-file FILE or HEARTH_TOKEN with a token that is valid (`hearthd token create NAME` on "
        "the daemon's machine makes one), or pair this device: `hearthd pair NAME` there, and here `hearth pair CODE`"
    )


def _report(error: Exception) -> None:
    # What a daemon says may hold anything; on a terminal it must not act.
    line = neutralise_line(str(error))
    print(f"hearth: {line}", file=sys.stderr)


def _drop_output() -> None:
    """Let go of what could not be written: Python would try, and complain, once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_standard_streams() -> None:
    """Whoever started the program may have closed them; then a socket could take their place, and get the answer.

    A character that stdout or stderr cannot show becomes a question mark, and no exception in mid-answer.
    """
    # Each takes the lowest free descriptor, so in this order each takes its own.
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
