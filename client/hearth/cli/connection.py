"""From the command line to a client: the only place of the program that makes one.

Called by the commands.
"""

import argparse
import logging
from typing import cast

from hearth._client import Client
from hearth._values import ChatOptions, ClientOptions
from hearth.cli.terminal import Screen

# Attributes of the parsed command line that are options of a chat, by the same names.
_CHAT_OPTIONS = frozenset(ChatOptions.__annotations__)


def open_client(arguments: argparse.Namespace, screen: Screen) -> Client:
    """Make the client that the command line describes; its waits are told on `screen`."""
    logger = logging.getLogger("hearth")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Notes(screen))
    options: ClientOptions = {"allow_plaintext_token": arguments.allow_plaintext_token}
    if arguments.daemon is not None:
        options["daemon"] = arguments.daemon
    if arguments.ca is not None:
        options["ca"] = arguments.ca
    if arguments.cert is not None:
        options["cert"] = arguments.cert
    if arguments.key is not None:
        options["key"] = arguments.key
    if arguments.token_file is not None:
        options["token_file"] = arguments.token_file
    if arguments.timeout is not None:
        options["timeout"] = options["call_timeout"] = arguments.timeout
    if arguments.wait is not None:
        options["ready_timeout"] = arguments.wait
    return Client(arguments.address, **options)


def chat_options(arguments: argparse.Namespace) -> ChatOptions:
    """The options of a chat that the command line gives."""
    return cast(ChatOptions, {name: value for name, value in vars(arguments).items() if name in _CHAT_OPTIONS})


class _Notes(logging.Handler):
    """Shows the client's remarks about its waits."""

    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self._screen.note(record.getMessage())
