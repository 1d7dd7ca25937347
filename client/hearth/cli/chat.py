"""`hearth chat`: a conversation in the terminal.

Called by `__main__`.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from hearth._client import Client
from hearth._errors import CallCancelledError, ConfigurationError, HearthError, InvalidRequestError
from hearth._values import Answer, ChatOptions, FinishReason, ModelInfo
from hearth.cli.connection import chat_options, open_client
from hearth.cli.conversation import Conversation
from hearth.cli.echo import without_echo
from hearth.cli.interrupt import closing_on_interrupt
from hearth.cli.line_input import read_turn
from hearth.cli.terminal import Screen
from hearth.cli.waiting import in_words

_HELP = """\
/system TEXT   instructions for the model from now on; alone: shows them; /system -: none
/forget [N]    drops the oldest N questions with their answers; 1 if not given
/reset         drops all of them, and keeps the instructions
/save FILE     writes the conversation, as JSON if FILE ends in .json
/help          shows these lines
/quit          ends the program, as Ctrl-D does
//...          says a line that begins with a slash
"""


def run(arguments: argparse.Namespace) -> int:
    """Talk until the input ends, and return the exit code."""
    screen = Screen()
    # Gives input() its line editing and history; a Python may be built without.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    with open_client(arguments, screen) as client:
        model = client.model(arguments.model)
        screen.note(
            f"{model.name} at {client.address}, context {model.context_length} tokens; /help lists the commands, "
            "Ctrl-D leaves"
        )
        Session(client, model, chat_options(arguments), Conversation(arguments.system), screen).run(_read_line)
    return 0


def _read_line(prompt: str) -> str:
    try:
        return input(prompt if sys.stdin.isatty() else "")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"standard input is not {error.encoding} text") from error


class Session:
    """One conversation between a person and a model."""

    def __init__(
        self, client: Client, model: ModelInfo, options: ChatOptions, conversation: Conversation, screen: Screen
    ) -> None:
        self._client = client
        self._model = model
        self._options = options
        self._conversation = conversation
        self._screen = screen
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._system,
            "/forget": self._forget,
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda _: screen.write(_HELP),
        }

    def run(self, read_line: Callable[[str], str]) -> None:
        """Take turns until the input ends."""
        while True:
            try:
                turn = read_turn(read_line)
                if turn.strip() in ("/quit", "/exit"):
                    return
                self._take(turn)
            except KeyboardInterrupt:
                # At the prompt: the terminal has echoed ^C, and the line is gone.
                self._screen.write("\n")
            except EOFError:
                if sys.stdin.isatty():
                    self._screen.write("\n")
                return

    def _take(self, turn: str) -> None:
        if turn.startswith("//"):
            self._ask(turn[1:])
        elif turn.startswith("/"):
            name, _, rest = turn.partition(" ")
            if command := self._commands.get(name.strip()):
                command(rest.strip())
            else:
                self._screen.error(f"there is no command {name}; /help lists them, // says a line that begins with /")
        elif turn.strip():
            self._ask(turn)

    def _ask(self, question: str) -> None:
        stream = self._client.stream(
            self._conversation.with_question(question),
            on_queued=lambda place: self._screen.note(in_words(place)),
            **self._options,
        )
        with closing_on_interrupt(stream) as interrupt, without_echo():
            try:
                for delta in stream:
                    self._screen.write(delta.text)
            except CallCancelledError as error:
                if not interrupt.happened:
                    self._not_kept(error)
                    return
            except HearthError as error:
                self._not_kept(error)
                return
            finally:
                self._screen.end_line()
        if interrupt.happened:
            self._stopped(question, stream.text)
            return
        self._conversation.keep(question, stream.answer.text)
        self._screen.note(self._figures(stream.answer))

    def _stopped(self, question: str, text: str) -> None:
        self._screen.end_line()
        if text:
            self._conversation.keep(question, text)
            self._screen.note("stopped; the conversation goes on from what is above")
        else:
            self._screen.note("stopped; the question is not kept")

    def _not_kept(self, error: HearthError) -> None:
        self._screen.error(str(error))
        # All else about the request is the same in each turn: what grows is the conversation.
        if isinstance(error, InvalidRequestError) and self._conversation.num_exchanges:
            self._screen.error(
                "that turn is not kept; if the conversation is too long for the context of "
                f"{self._model.context_length} tokens, /forget drops its oldest part and /reset all of it"
            )
        else:
            self._screen.error("that turn is not kept")

    def _figures(self, answer: Answer) -> str:
        usage, timings = answer.usage, answer.timings
        used = usage.prompt_tokens + usage.completion_tokens
        figures = (
            f"{usage.completion_tokens} tokens, {timings.decode_tokens_per_second:.1f} tokens/s, "
            f"first after {timings.time_to_first_token_seconds:.2f} s, "
            f"context {used} of {self._model.context_length}"
        )
        if answer.finish_reason is FinishReason.LENGTH:
            is_full = used >= self._model.context_length
            figures += "; cut off: " + (
                "the context is full, /forget or /reset makes room" if is_full else "the limit of tokens is reached"
            )
        elif answer.finish_reason is FinishReason.TIME_LIMIT:
            figures += "; cut off: the daemon's limit of time is reached"
        elif answer.finish_reason is FinishReason.POLICY:
            figures += "; ended by a rule of the daemon's owner"
        if answer.throttled:
            figures += "; slower than usual: the board is hot or short of power"
        return figures

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = None if text == "-" else text
        self._screen.note(self._conversation.system or "no instructions")

    def _forget(self, text: str) -> None:
        if text and not (text.isascii() and text.isdigit()):
            self._screen.error(f"/forget takes a number of questions, not {text!r}")
            return
        dropped = self._conversation.forget(int(text[:9] or 1))
        self._screen.note(f"dropped {dropped}; {self._conversation.num_exchanges} left")

    def _reset(self, _text: str) -> None:
        self._conversation.forget(self._conversation.num_exchanges)
        self._screen.note("a new conversation")

    def _save(self, text: str) -> None:
        if not text:
            self._screen.error("/save takes the name of a file")
            return
        try:
            self._conversation.save(Path(text).expanduser())
        except (OSError, ValueError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._screen.error(f"{text!r} is not saved: {reason}")
        else:
            self._screen.note(f"saved to {text}")
