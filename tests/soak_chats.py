"""What the callers of a soak do, one function each: asks, leaves, dawdles, lies, comes back. Called by `soak`.

Each function is one caller's visit. It raises AssertionError when the daemon does anything else than it promises.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hearth import (
    AuthenticationError,
    CallCancelledError,
    Client,
    DeadlineError,
    FinishReason,
    InvalidRequestError,
    Message,
)
from hearthd.access.tokens import create_token, revoke_token
from tls_files import TlsFiles, renew_certificate

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "How many legs has a spider?",
    "Write one sentence about the sea.",
    "Which animal says meow?",
)
WORDS = ("lamp", "kitchen", "while", "rain", "falls", "over", "green", "hills", "and", "cat", "sleeps", "near", "books")


@dataclass
class Place:
    """Where the daemon is, and what the callers have learned of it. Any thread."""

    port: int
    tls: TlsFiles
    token_file: Path
    token: str
    context_length: int
    stop: threading.Event
    answers: dict[str, str] = field(default_factory=dict)
    """The first greedy answer to each question: every later one must be the same, whoever was there beside it."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    num_tokens_made: int = 0

    def connect(self, token: str | None = None) -> Client:
        return Client(
            f"127.0.0.1:{self.port}", ca=self.tls.ca, token=token or self.token, max_retries=50, ready_timeout=30
        )


def ask(place: Place, chance: random.Random) -> None:
    """A question with one right answer: that which was given the first time."""
    question = chance.choice(QUESTIONS)
    with place.connect() as client:
        text = client.chat(question, temperature=0, max_tokens=24).text
    with place.lock:
        expected = place.answers.setdefault(question, text)
    assert text == expected, f"two greedy answers to one question: {len(expected)} and {len(text)} characters"


def converse(place: Place, chance: random.Random) -> None:
    """Three turns over one connection; the beginning comes from the cache."""
    messages: list[Message] = []
    with place.connect() as client:
        for _ in range(3):
            messages.append(Message("user", chance.choice(QUESTIONS)))
            answer = client.chat(messages, temperature=0.8, seed=chance.randrange(2**31), max_tokens=20)
            messages.append(Message("assistant", answer.text))


def cancel(place: Place, chance: random.Random) -> None:
    """Leaves after some pieces."""
    with place.connect() as client, client.stream(chance.choice(QUESTIONS), max_tokens=60) as stream:
        for _, _delta in zip(range(chance.randrange(5)), stream, strict=False):
            pass


def run_out_of_time(place: Place, chance: random.Random) -> None:
    with place.connect() as client, contextlib.suppress(DeadlineError):
        client.chat(prompt_of(place.context_length // 2, chance), timeout=chance.uniform(0.02, 0.5), max_tokens=60)


def dawdle(place: Place, chance: random.Random) -> None:
    """Reads slowly: a piece each half second, and leaves in the middle."""
    with place.connect() as client, client.stream(chance.choice(QUESTIONS), max_tokens=40, temperature=0.9) as stream:
        for _, _delta in zip(range(6), stream, strict=False):
            if place.stop.wait(0.5):
                return


def fill_the_context(place: Place, chance: random.Random) -> None:
    with place.connect() as client:
        answer = client.chat(prompt_of(place.context_length - 200, chance), max_tokens=8, temperature=0)
    assert answer.finish_reason in (FinishReason.END_OF_TURN, FinishReason.LENGTH)


def overflow_the_context(place: Place, chance: random.Random) -> None:
    with place.connect() as client:
        try:
            client.chat(prompt_of(2 * place.context_length, chance))
        except InvalidRequestError:
            return
    raise AssertionError("a prompt that does not fit was taken")


def lie(place: Place, chance: random.Random) -> None:
    """Comes with a token that nobody made, and with one that was just revoked."""
    with place.lock:
        place.num_tokens_made += 1
        name = f"guest{place.num_tokens_made}"
    guest = create_token(place.token_file, name)
    with place.connect(guest) as client:
        client.status()
        revoke_token(place.token_file, name)
        refused(client)
    with place.connect("hearth_" + "x" * 43) as client:
        refused(client)


def refused(client: Client) -> None:
    try:
        client.chat("Let me in.")
    except AuthenticationError:
        return
    raise AssertionError("a wrong token was let in")


def say_nothing(place: Place, chance: random.Random) -> None:
    """Ten connections that say nothing or nonsense, and are hung up on."""
    sockets = [socket.create_connection(("127.0.0.1", place.port), timeout=30) for _ in range(10)]
    try:
        for index, connection in enumerate(sockets):
            if index % 2:
                connection.sendall(os.urandom(64))
        for connection in sockets:
            try:
                while connection.recv(4096):
                    pass
            except ConnectionError:
                pass
    finally:
        for connection in sockets:
            connection.close()


def vanish(place: Place, chance: random.Random) -> None:
    """Closes the connection under a running call."""
    client = place.connect()
    stream = client.stream(prompt_of(place.context_length // 3, chance), max_tokens=60)
    ended: list[BaseException] = []

    def read() -> None:
        try:
            stream.read()
        except Exception as error:  # noqa: BLE001 - judged below, in the caller's thread
            ended.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    place.stop.wait(chance.uniform(0.05, 0.6))
    client.close()
    reader.join(30)
    assert not reader.is_alive(), "a call outlived its connection"
    assert all(isinstance(error, CallCancelledError) for error in ended), f"{ended} for a call that was closed"


def renew(place: Place, chance: random.Random) -> None:
    """A new certificate while others connect."""
    with place.lock:
        renew_certificate(place.tls)


VISITS: tuple[tuple[Callable[[Place, random.Random], None], int], ...] = (
    (ask, 8),
    (converse, 3),
    (cancel, 5),
    (run_out_of_time, 3),
    (dawdle, 3),
    (fill_the_context, 2),
    (overflow_the_context, 2),
    (lie, 3),
    (say_nothing, 1),
    (vanish, 3),
    (renew, 1),
)


def prompt_of(num_tokens: int, chance: random.Random) -> str:
    """Roughly so many tokens; one of the words is about one token."""
    return " ".join(chance.choice(WORDS) for _ in range(num_tokens))
