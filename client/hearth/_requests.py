"""Requests: what a program gives, as messages of hearth.v1.

Checks only what cannot be written down in the protocol; ranges and limits are the daemon's. Called by `_operations`.
"""

from collections.abc import Iterable
from typing import Any

from hearth._errors import InvalidRequestError
from hearth._values import ChatOptions, Message
from hearth.v1 import chat_pb2, model_pb2

_ROLES = {
    "system": chat_pb2.ROLE_SYSTEM,
    "user": chat_pb2.ROLE_USER,
    "assistant": chat_pb2.ROLE_ASSISTANT,
}
_PRIORITIES = {
    "interactive": chat_pb2.PRIORITY_INTERACTIVE,
    "normal": chat_pb2.PRIORITY_NORMAL,
    "background": chat_pb2.PRIORITY_BACKGROUND,
}
_NOT_SAMPLING = frozenset({"model", "request_id"})


def chat_request(messages: str | Iterable[Message], options: ChatOptions) -> chat_pb2.ChatRequest:
    """Make the request of a chat. A str is one message of the user.

    Raises InvalidRequestError if a value cannot stand in the message, TypeError on an option that does not exist.
    """
    if unknown := options.keys() - ChatOptions.__annotations__.keys():
        raise TypeError(f"unknown option {min(unknown)!r}; there are {', '.join(sorted(ChatOptions.__annotations__))}")
    request = chat_pb2.ChatRequest()
    _add_messages(request.messages, [Message("user", messages)] if isinstance(messages, str) else messages)
    for name, value in options.items():
        if value is None:
            continue
        if name in _NOT_SAMPLING:
            _set(request, name, value, field=name)
        elif name == "priority":
            _set_priority(request, value)
        elif name == "stop":
            _set_stop(request.sampling, value)
        else:
            _set(request.sampling, name, value, field=f"sampling.{name}")
    return request


def count_tokens_request(text: str | Iterable[Message], model: str | None) -> model_pb2.CountTokensRequest:
    """Make the request that counts a text alone, or a conversation with the model's template."""
    request = model_pb2.CountTokensRequest()
    if model is not None:
        _set(request, "model", model, field="model")
    if isinstance(text, str):
        _set(request, "text", text, field="text")
    else:
        request.conversation.SetInParent()
        _add_messages(request.conversation.messages, text)
    return request


def get_model_request(name: str | None) -> model_pb2.GetModelRequest:
    """Make the request that describes a model; None is the default one."""
    request = model_pb2.GetModelRequest()
    if name is not None:
        _set(request, "name", name, field="name")
    return request


def _add_messages(target: Any, messages: Iterable[Message]) -> None:
    for index, message in enumerate(messages):
        if not isinstance(message, Message):
            raise TypeError(f"messages[{index}] is of type {type(message).__name__}, not hearth.Message")
        if message.role not in _ROLES:
            raise InvalidRequestError(
                f"messages[{index}].role is {message.role!r}; there are system, user and assistant",
                field=f"messages[{index}].role",
            )
        turn = target.add(role=_ROLES[message.role])
        _set(turn, "content", message.content, field=f"messages[{index}].content")


def _set_priority(request: chat_pb2.ChatRequest, value: Any) -> None:
    if value not in _PRIORITIES:
        raise InvalidRequestError(f"priority is {value!r}; there are {', '.join(_PRIORITIES)}", field="priority")
    request.priority = _PRIORITIES[value]


def _set_stop(sampling: chat_pb2.SamplingOptions, value: Any) -> None:
    for index, text in enumerate([value] if isinstance(value, str) else value):
        try:
            sampling.stop.append(text)
        except UnicodeEncodeError as error:
            raise _not_text(f"sampling.stop[{index}]") from error


def _set(message: Any, name: str, value: Any, *, field: str) -> None:
    """Set one field; the value of a wrong type is a TypeError, as everywhere in Python."""
    try:
        setattr(message, name, value)
    except UnicodeEncodeError as error:
        raise _not_text(field) from error
    except ValueError as error:
        raise InvalidRequestError(f"{field} is {value!r}, which the protocol cannot hold", field=field) from error


def _not_text(field: str) -> InvalidRequestError:
    # Half of a surrogate pair: Python's mark for a byte that was not text where the str was read.
    return InvalidRequestError(f"{field} holds bytes that are not UTF-8 text", field=field)
