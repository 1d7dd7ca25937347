"""The command line of `hearth` and its help.

Imports neither gRPC nor the client: `hearth --help` answers at once. Called by `__main__`.
"""

import argparse
import math

_EPILOG = """\
addresses:
  unix:///run/hearth/hearthd.sock    a Unix socket of this machine
  raspberrypi.local:50051             a host and a port
  [::1]:50051                         an IPv6 address and a port

  Not given: HEARTH_ADDRESS; else the daemon that this user is paired with
  (`hearth pair`; several: --daemon NAME or HEARTH_DAEMON says which); else
  $XDG_RUNTIME_DIR/hearth/hearthd.sock or /run/hearth/hearthd.sock, the
  first where somebody listens, looked at again while nobody does (--wait);
  else, where there is no such socket, 127.0.0.1:50051.

environment:
  HEARTH_ADDRESS      where the daemon is
  HEARTH_DAEMON       which of the paired ones it is
  HEARTH_CA           file with the certificate that the daemon's is checked against
  HEARTH_CERT         file with the certificate that says who calls, and
  HEARTH_KEY          file with its key, where the daemon asks for them
  HEARTH_TOKEN        the token that the daemon wants
  HEARTH_TOKEN_FILE   a file that holds it
  NO_COLOR            set to anything: no dim text

exit status:
  0    success
  1    an error; one line on standard error says which. Also a question or an
       option's value that the daemon refuses, or that no request can hold
  2    wrong usage that the program sees by itself: no question, no such option,
       no number where one belongs, an address or a file that cannot be used
  130  interrupted with Ctrl-C; what was printed of an answer stays
  141  whoever read the output is gone
"""

_EXAMPLES = {
    "": """\
examples:
  hearth ask "Why is the sky blue?"
  hearth chat --system "You are a patient teacher."
  hearth status --address raspberrypi.local:50051 --ca ca.pem --token-file token
""",
    "ask": """\
The question is the words given. If standard input is not a terminal, it is read to its end and added below them;
without words, it is the whole question. A program that runs `hearth ask WORDS` beside other input gives it </dev/null.

examples:
  hearth ask Why is the sky blue
  hearth ask "Summarise this:" < letter.txt
  hearth ask --json --temperature 0 --max-tokens 40 "Name three birds." | jq -r .text
""",
    "chat": """\
in the conversation:
  /help              lists the commands
  Ctrl-C             stops the answer, or throws away the line that is being typed
  Ctrl-D             ends the program
  a \\ at the end     goes on in the next line
  \"\"\"                begins a text of several lines, and ends it

Lines already typed come back with the arrow keys; they are kept in memory only.
""",
    "status": """\
With --watch, it is shown again and again until Ctrl-C: in one place on a terminal, a line at a time in a pipe, with
--json an object at a time. A daemon that goes away is waited for. Each look is a call: a role with requests_per_minute
needs an --interval to match.

examples:
  hearth status --watch
  hearth status --watch --interval 60 --json >> status.jsonl
""",
    "models": "",
    "pair": """\
The code is printed by `hearthd pair NAME` on the daemon's machine; it is good once, for some minutes. The daemon's
certificate is compared with the code before anything is sent. Address, certificate and token are kept in
~/.config/hearth/daemons, readable by this user alone; from then on `hearth ask` needs no options.

examples:
  hearth pair hearth://raspberrypi.local+192.168.1.7:50051/QC4WZW-9Q3SKW-ZXCCMD-6KTXZP-8YBJ85-XF52NP-CQYC2D-5DW0CN
  hearth pair --list
  hearth pair --forget raspberrypi
""",
    "discover": """\
Needs the package zeroconf: pip install 'hearth-chat[discover]'; and on the board, in hearthd.toml, [discovery] announce
= true, which is off unless set. Whoever announces itself says what it likes: `hearth pair` compares the certificate,
this list does not.
""",
}


def make_parser() -> argparse.ArgumentParser:
    """The parser; its result has `command` and that command's options."""
    parser = argparse.ArgumentParser(
        prog="hearth",
        description="Talk to the chat model that lives in the house.",
        epilog=f"{_EPILOG}\n{_EXAMPLES['']}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in (
        ("ask", "ask one question and print the answer as it comes"),
        ("chat", "hold a conversation in the terminal"),
        ("status", "print what the daemon is doing"),
        ("models", "list the models that the daemon serves"),
        ("pair", "become a caller of a daemon, by the code that it printed"),
        ("discover", "list the daemons that announce themselves on the local network"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=_EXAMPLES[name] + "\nAddresses, environment and exit status: hearth --help",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == "ask":
            command.add_argument("words", nargs="*", metavar="WORD", help="the question")
        if name in ("ask", "chat"):
            _add_chat_options(command)
        if name != "chat":
            command.add_argument("--json", action="store_true", help="print one JSON object")
        if name == "status":
            command.add_argument("--watch", action="store_true", help="show it again and again, until Ctrl-C")
            command.add_argument(
                "--interval", type=_seconds, default=1.0, metavar="SECONDS", help="between two looks; 1 if not given"
            )
        if name == "pair":
            _add_pair_options(command)
            continue
        if name == "discover":
            _add_discover_options(command)
            continue
        # The question of `status` is how the daemon is now: there is nothing to wait for.
        _add_connection_options(command, offers_wait=name != "status")
    return parser


def _add_chat_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("answer", "What is not given, the model's own defaults decide.")
    group.add_argument("--model", metavar="NAME", help="one of `hearth models`; the daemon's default if not given")
    group.add_argument("--system", metavar="TEXT", help="instructions for the model, before the conversation")
    group.add_argument("--max-tokens", type=int, metavar="N", help="the most tokens that an answer may have")
    group.add_argument("--temperature", type=float, metavar="X", help="0: the likeliest always; up to 2: more varied")
    group.add_argument("--top-k", type=int, metavar="N", help="choose among the N likeliest tokens; 0: all")
    group.add_argument("--top-p", type=float, metavar="X", help="choose among the likeliest that add up to X")
    group.add_argument("--min-p", type=float, metavar="X", help="drop tokens less likely than X of the likeliest")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="over 1: repeat less")
    group.add_argument("--presence-penalty", type=float, metavar="X", help="over 0: leave what was said")
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="over 0: leave what was said often")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given again")
    group.add_argument(
        "--priority", choices=("interactive", "normal", "background"), help="how urgent it is, among other callers"
    )
    if command.prog.endswith("ask"):
        group.add_argument(
            "--top-logprobs", type=int, metavar="N", help="with --json: log probabilities, with N alternatives each"
        )
        group.add_argument("--request-id", metavar="ID", help="names the request in the daemon's journal")


def _add_pair_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("code", nargs="?", metavar="CODE", help="the line that `hearthd pair NAME` printed")
    command.add_argument("--name", metavar="NAME", help="what to call the daemon; as it calls itself if not given")
    command.add_argument("--list", action="store_true", help="list the daemons that this user is paired with")
    command.add_argument("--forget", metavar="NAME", help="remove one of them from this machine")


def _add_discover_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--seconds", type=_seconds_of_an_hour, default=3.0, metavar="SECONDS", help="how long to listen; 3 if not given"
    )
    command.add_argument(
        "--interface",
        action="append",
        metavar="ADDRESS",
        help="this machine's own address on the network to ask; all networks if not given; may be given again",
    )


def _add_connection_options(command: argparse.ArgumentParser, *, offers_wait: bool) -> None:
    group = command.add_argument_group("connection")
    group.add_argument("--address", metavar="ADDRESS", help="where the daemon is; see hearth --help")
    group.add_argument("--daemon", metavar="NAME", help="one of `hearth pair --list`, instead of an address")
    group.add_argument("--ca", metavar="FILE", help="certificate (PEM) to check the daemon's against; makes it TLS")
    group.add_argument("--cert", metavar="FILE", help="certificate (PEM) that says who calls, where the daemon asks")
    group.add_argument("--key", metavar="FILE", help="file with its key (PEM)")
    group.add_argument("--token-file", metavar="FILE", help="file with the token that the daemon wants")
    group.add_argument(
        "--allow-plaintext-token",
        action="store_true",
        help="send the token over the network unencrypted, where anyone can read it",
    )
    group.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="give up after so long; 600 for an answer, 10 otherwise, if not given; inf: never",
    )
    if not offers_wait:
        command.set_defaults(wait=None)
        return
    group.add_argument(
        "--wait",
        type=_seconds_or_0,
        metavar="SECONDS",
        help="wait so long for a daemon that is just starting; 10 if not given",
    )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds over 0")
    return seconds


def _seconds_of_an_hour(text: str) -> float:
    if (seconds := _seconds(text)) > 3600:
        raise argparse.ArgumentTypeError(f"{text} is over an hour, 3600 seconds")
    return seconds


def _seconds_or_0(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds, at least 0")
    return seconds


# argparse names the type in its message when float() refuses the text.
_seconds.__name__ = _seconds_or_0.__name__ = _seconds_of_an_hour.__name__ = "number of seconds"


class _Version(argparse.Action):
    """Reads the version only when it is asked for: importlib.metadata takes longer than all the rest."""

    def __init__(self, option_strings: list[str], dest: str, **options: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=options.get("help"))

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            text = version("hearth-chat")
        except PackageNotFoundError:
            text = "(not installed: run from its source)"
        print(f"hearth {text}")
        parser.exit()
