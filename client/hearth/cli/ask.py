"""`hearth ask`: one question, one answer, printed as it comes.

Called by `__main__`.
"""

import argparse
import io
import json
import select
import sys
from dataclasses import asdict
from typing import Any

from hearth._errors import CallCancelledError, ConfigurationError
from hearth._values import Answer, FinishReason, Message, TokenProbability
from hearth.cli.connection import chat_options, open_client
from hearth.cli.interrupt import closing_on_interrupt
from hearth.cli.terminal import Screen
from hearth.cli.waiting import in_words

EXIT_INTERRUPTED = 130
# A daemon takes far less (`limits.max_request_bytes`); this only keeps an endless input from filling the memory.
_MAX_INPUT_BYTES = 4 << 20
# Whoever gave words may not know that an open pipe is read too, and would see a program that hangs.
_SILENCE_SECONDS = 1.0


def run(arguments: argparse.Namespace) -> int:
    """Ask, print, return the exit code."""
    screen = Screen()
    messages = [Message("user", _question(arguments.words, screen))]
    if arguments.system is not None:
        messages.insert(0, Message("system", arguments.system))
    with open_client(arguments, screen) as client:
        stream = client.stream(
            messages,
            on_queued=lambda place: screen.note(in_words(place)),
            **chat_options(arguments),
        )
        with closing_on_interrupt(stream) as interrupt:
            try:
                for delta in stream:
                    if not arguments.json:
                        screen.write(delta.text)
            except CallCancelledError:
                if not interrupt.happened:
                    raise
            finally:
                screen.end_line()
        if interrupt.happened:
            return EXIT_INTERRUPTED
        answer = stream.answer
    if arguments.json:
        screen.write(json.dumps(_as_json(answer), ensure_ascii=not screen.encoding_is_unicode) + "\n")
    elif answer.finish_reason is FinishReason.LENGTH:
        screen.note("the answer may break off: it reached --max-tokens, or the end of the model's context")
    elif answer.finish_reason is FinishReason.TIME_LIMIT:
        screen.note("the answer may break off: it reached the daemon's limit of time")
    elif answer.finish_reason is FinishReason.POLICY:
        screen.note("the answer may break off: a rule of the daemon's owner ended it")
    return 0


def _question(words: list[str], screen: Screen) -> str:
    parts = [" ".join(words)]
    if not words or not sys.stdin.isatty():
        if words and not select.select([sys.stdin], [], [], _SILENCE_SECONDS)[0]:
            screen.error("reading standard input to its end; </dev/null if there is none")
        parts.append(_read_input(sys.stdin))
    question = "\n\n".join(part for part in parts if part.strip())
    if not question:
        raise ConfigurationError('there is no question: give one (hearth ask "...") or pipe one in')
    return question


def _read_input(source: Any) -> str:
    data = source.buffer.read(_MAX_INPUT_BYTES + 1)
    if len(data) > _MAX_INPUT_BYTES:
        raise ConfigurationError(f"standard input has over {_MAX_INPUT_BYTES} bytes, which no daemon takes")
    try:
        text = io.TextIOWrapper(io.BytesIO(data), encoding=source.encoding, errors="strict").read()
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"standard input is not {error.encoding} text: byte {error.object[error.start]:#04x} at {error.start}"
        ) from error
    return text.removesuffix("\n")


def _as_json(answer: Answer) -> dict[str, Any]:
    fields = asdict(answer)
    if answer.token_logprobs:
        fields["token_logprobs"] = [
            {"chosen": _probability(entry.chosen), "top": list(map(_probability, entry.top))}
            for entry in answer.token_logprobs
        ]
    else:
        del fields["token_logprobs"]
    return fields


def _probability(entry: TokenProbability) -> dict[str, Any]:
    # Bytes need not be whole characters, which JSON could not hold.
    return {
        "token_id": entry.token_id,
        "text": entry.text.decode("utf-8", "replace"),
        "bytes": list(entry.text),
        "logprob": entry.logprob,
    }
