"""Renders a conversation with the model's chat template, set up as transformers does it.

A template is code. It comes from the bundle, whose hashes were checked, never from a request, and runs in Jinja's
sandbox all the same. Knows no tokens. Called by `tokenizer`; `services` calls `validate_messages`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any, Literal, NoReturn, get_args

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from hearthd.errors import MAX_PROBLEMS, BundleError, InvalidRequestError

__all__ = ["ChatTemplate", "Message", "Role", "check_encodable", "validate_messages"]

Role = Literal["system", "user", "assistant"]

# What an expression in a template can raise besides Jinja's own errors.
_EVALUATION_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


def validate_messages(messages: Sequence[Message], *, must_end_with_user: bool = True) -> None:
    """Check that this is a conversation: at least one message, a system message only as the first, none empty.

    But for the assistant's: an answer is empty when a stop string cut all of it off, and comes back as history.

    must_end_with_user: whether the model is to answer; a conversation that is only counted may end with any role.
    Whether roles must alternate is for the model's template to say. Raises InvalidRequestError with all that is wrong.
    """
    problems = list(islice(_find_problems(messages, must_end_with_user), MAX_PROBLEMS))
    if problems:
        raise InvalidRequestError.of(problems)


def _find_problems(messages: Sequence[Message], must_end_with_user: bool) -> Iterator[InvalidRequestError]:
    if not messages:
        yield InvalidRequestError("messages", "is empty; give at least 1 message")
    for place, message in enumerate(messages):
        role, content = f"messages[{place}].role", f"messages[{place}].content"
        if message.role not in get_args(Role):
            yield InvalidRequestError(role, f"is not one of {', '.join(get_args(Role))}")
        elif message.role == "system" and place > 0:
            yield InvalidRequestError(role, "is system; give at most 1 system message, as the first")
        elif must_end_with_user and message.role != "user" and place == len(messages) - 1:
            yield InvalidRequestError(role, f"is {message.role}; the last message must be the user's")
        if not message.content and message.role != "assistant":
            yield InvalidRequestError(content, "is empty; give text, or leave the message out")
        try:
            check_encodable(content, message.content)
        except InvalidRequestError as error:
            yield error


def check_encodable(field: str, text: str) -> None:
    """Raise InvalidRequestError for a text that is not Unicode: a lone surrogate, which UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            field, f"has a lone surrogate at character {error.start + 1}; give valid Unicode text"
        ) from None


class ChatTemplate:
    """A compiled chat template."""

    def __init__(
        self, source: str, *, bos_token: str, eos_token: str, now: Callable[[], datetime] = datetime.now
    ) -> None:
        """bos_token, eos_token: what the template knows by these names. now: local time, which some templates state.

        Raises BundleError if the source is not a template.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format_: now().strftime(format_)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise BundleError(f"chat_template.jinja is not a template that can run: {_first_line(error)}") from error
        self._variables = {"bos_token": bos_token, "eos_token": eos_token, "tools": None, "documents": None}
        self.source = source

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """Render messages, each a mapping of role and content.

        Raises InvalidRequestError if the template refuses them.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except jinja2.TemplateError as error:
            reason = _first_line(error)
            # Other words than the template's own may be a caller's, and messages reach the journal.
            if reason not in self.source:
                reason = type(error).__name__
            raise InvalidRequestError("messages", f"do not fit the model's chat template: {reason}") from None
        except _EVALUATION_ERRORS as error:
            reason = type(error).__name__
            raise InvalidRequestError("messages", f"do not fit the model's chat template: {reason}") from None


class _GenerationBlock(jinja2.ext.Extension):
    """Reads `{% generation %}`, with which some templates enclose what the model wrote, as if it were not there."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way to declare it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, >, & and ' for HTML, which a model must not see.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
