"""`hearth chat` on a terminal: a pty, a scripted daemon, and a person who types."""

from __future__ import annotations

import json
import os
import signal
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hearth_program as program
import scripted_daemon as peer
from hearth.cli.conversation import Conversation
from hearth.cli.line_input import read_turn
from hearth.cli.terminal import neutralise, neutralise_line
from hearth.v1 import chat_pb2

FIGURES = "3 tokens, 40.0 tokens/s, first after 0.03 s, context 13 of 64"


@pytest.fixture
def daemon() -> Iterator[peer.ScriptedDaemon]:
    with peer.ScriptedDaemon() as daemon:
        yield daemon


@pytest.fixture
def chat(daemon: peer.ScriptedDaemon) -> Iterator[program.Terminal]:
    with program.Terminal("chat", "--address", daemon.address) as terminal:
        terminal.expect(f"tiny at {daemon.address}, context 64 tokens; /help lists the commands, Ctrl-D leaves\n> ")
        yield terminal


def said(request: chat_pb2.ChatRequest) -> list[str]:
    return [f"{chat_pb2.Role.Name(message.role)[5:].lower()}: {message.content}" for message in request.messages]


def test_an_answer_that_was_held_back_says_why(chat: program.Terminal, daemon: peer.ScriptedDaemon) -> None:
    daemon.script = lambda *_: [peer.delta("warm"), peer.final(throttled=True)]
    chat.type("Hi\n")
    chat.expect(f"warm\n{FIGURES}; slower than usual: the board is hot or short of power\n> ")


def test_a_conversation(chat: program.Terminal, daemon: peer.ScriptedDaemon) -> None:
    chat.type("Hi\n")
    chat.expect(f"Hello, world\n{FIGURES}\n> ")
    chat.type("  \n")
    chat.expect("> ")
    chat.type("Bye\n")
    chat.expect(f"Hello, world\n{FIGURES}\n> ")
    chat.type("\x04")
    assert chat.wait() == 0
    assert chat.shown.endswith("\n")
    assert said(daemon.requests[1]) == ["user: Hi", "assistant: Hello, world", "user: Bye"]
    assert len(daemon.requests) == 2


def test_ctrl_c_stops_the_answer_and_not_the_program(chat: program.Terminal, daemon: peer.ScriptedDaemon) -> None:
    def half(_: Any, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
        yield peer.delta("half of it")
        peer.wait_for_end(context)

    def silence(_: Any, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
        yield peer.queued(1)
        peer.wait_for_end(context)

    daemon.script = peer.in_turn(half, silence, peer.say("done"))
    chat.type("one\n")
    chat.expect("half of it")
    chat.type("\x03")
    chat.expect("stopped; the conversation goes on from what is above\n> ")
    assert daemon.chat_ended.wait(5)
    chat.type("two\n")
    chat.expect("waiting; 1 before this one")
    chat.type("\x03")
    chat.expect("stopped; the question is not kept\n> ")
    chat.type("three\n")
    chat.expect("done\n")
    chat.expect("> ")
    assert said(daemon.requests[2]) == ["user: one", "assistant: half of it", "user: three"]


@pytest.fixture
def tty(chat: program.Terminal) -> Iterator[int]:
    """The program's terminal itself, which outlives the program."""
    descriptor = os.open(f"/proc/{chat.process.pid}/fd/0", os.O_RDWR | os.O_NOCTTY)
    yield descriptor
    os.close(descriptor)


def echoes(tty: int) -> bool:
    return bool(termios.tcgetattr(tty)[3] & termios.ECHO)


def half_an_answer(_: Any, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
    yield peer.delta("half")
    peer.wait_for_end(context)


def test_what_is_typed_meanwhile_stays_out_of_the_answer(
    chat: program.Terminal, daemon: peer.ScriptedDaemon, tty: int
) -> None:
    go_on = threading.Event()

    def script(*_: Any) -> Iterator[chat_pb2.ChatResponse]:
        yield peer.delta("half, ")
        assert go_on.wait(20)
        yield peer.delta("whole")
        yield peer.final()

    daemon.script = peer.in_turn(script, peer.say("fine"))
    chat.type("one\n")
    chat.expect("half, ")
    assert not echoes(tty)
    chat.type("two\n")
    go_on.set()
    assert chat.expect("whole\n") == ""
    assert chat.expect(f"{FIGURES}\n> ") == ""
    assert chat.expect("fine\n") == "two\n"
    assert said(daemon.requests[1])[-1] == "user: two"
    chat.expect("> ")
    chat.type("/quit\n")
    assert chat.process.wait(20) == 0
    assert echoes(tty)


def test_ctrl_c_and_an_error_give_the_echo_back(chat: program.Terminal, daemon: peer.ScriptedDaemon, tty: int) -> None:
    def breaks(_: Any, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
        yield peer.delta("half")
        context.abort(grpc.StatusCode.INTERNAL, "internal error, id 77")

    daemon.script = peer.in_turn(half_an_answer, breaks)
    chat.type("one\n")
    chat.expect("half")
    assert not echoes(tty)
    chat.type("\x03")
    chat.expect("stopped; the conversation goes on from what is above\n> ")
    chat.type("two\n")
    chat.expect("that turn is not kept\n> ")
    chat.type("/quit\n")
    assert chat.process.wait(20) == 0
    assert echoes(tty)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_in_mid_answer_gives_the_echo_back(
    chat: program.Terminal, daemon: peer.ScriptedDaemon, tty: int, number: signal.Signals
) -> None:
    daemon.script = half_an_answer
    chat.type("one\n")
    chat.expect("half")
    assert not echoes(tty)
    chat.process.send_signal(number)
    assert chat.process.wait(20) == -number
    assert echoes(tty)


def test_an_answer_without_text_is_followed_by_the_next_turn(
    chat: program.Terminal, daemon: peer.ScriptedDaemon
) -> None:
    """All of it was cut by a stop string."""
    nothing = peer.final(finish_reason=chat_pb2.FINISH_REASON_STOP_STRING)
    daemon.script = peer.in_turn(lambda *_: [nothing], peer.say("fine"))
    chat.type("one\n")
    chat.expect(f"{FIGURES}\n> ")
    chat.type("two\n")
    chat.expect(f"fine\n{FIGURES}\n> ")
    assert said(daemon.requests[1]) == ["user: one", "assistant: ", "user: two"]


def test_ctrl_c_at_the_prompt_throws_the_line_away(chat: program.Terminal, daemon: peer.ScriptedDaemon) -> None:
    chat.type("half a li")
    chat.expect("half a li")
    chat.interrupt("\n> ")
    chat.type('"""\nmore')
    chat.expect(". more")
    chat.interrupt("\n> ")
    chat.type("whole\n")
    chat.expect("Hello, world\n")
    assert said(daemon.requests[0]) == ["user: whole"]


def test_several_lines(chat: program.Terminal, daemon: peer.ScriptedDaemon) -> None:
    chat.type("first\\\n")
    chat.expect(". ")
    chat.type("second\n")
    chat.expect("> ")
    chat.type('"""\n')
    chat.expect(". ")
    chat.type("a\n")
    chat.expect(". ")
    chat.type('\n  b"""\n')
    chat.expect("Hello, world\n")
    assert daemon.requests[0].messages[-1].content == "first\nsecond"
    assert daemon.requests[1].messages[-1].content == "a\n\n  b"


def test_lines_come_back_with_the_arrow_key(daemon: peer.ScriptedDaemon) -> None:
    with program.Terminal("chat", "--address", daemon.address, TERM="xterm") as chat:
        chat.expect("> ")
        chat.type("again\n")
        chat.expect("tokens/s")
        chat.expect("> ")
        chat.type("\x1b[A\n")
        chat.expect("tokens/s")
    assert said(daemon.requests[1])[-1] == "user: again"


def test_commands(chat: program.Terminal, daemon: peer.ScriptedDaemon) -> None:
    def enter(line: str, expected: str) -> None:
        chat.type(f"{line}\n")
        chat.expect(f"{expected}\n> ")

    enter("/help", "//...          says a line that begins with a slash")
    enter("/system", "no instructions")
    enter("/system Be brief.", "Be brief.")
    for number in range(3):
        enter(f"question {number}", FIGURES)
    enter("/forget two", "hearth: /forget takes a number of questions, not 'two'")
    enter("/forget", "dropped 1; 2 left")
    enter("//forget", FIGURES)
    assert said(daemon.requests[-1]) == [
        "system: Be brief.",
        "user: question 1",
        "assistant: Hello, world",
        "user: question 2",
        "assistant: Hello, world",
        "user: /forget",
    ]
    enter("/forget 99", "dropped 3; 0 left")
    enter("/system -", "no instructions")
    enter("fresh", FIGURES)
    enter("/reset", "a new conversation")
    enter("fresh", FIGURES)
    assert said(daemon.requests[-1]) == said(daemon.requests[-2]) == ["user: fresh"]
    enter("/sing", "hearth: there is no command /sing; /help lists them, // says a line that begins with /")
    chat.type("/quit\n")
    assert chat.wait() == 0


def test_save(chat: program.Terminal, daemon: peer.ScriptedDaemon, tmp_path: Path) -> None:
    def save(name: str, expected: str) -> None:
        chat.type(f"/save {tmp_path}/{name}\n")
        chat.expect(f"{expected}\n> ")

    chat.type("Hi\n")
    chat.expect(f"{FIGURES}\n> ")
    save("it.json", f"saved to {tmp_path}/it.json")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, world"}]
    assert json.loads((tmp_path / "it.json").read_text()) == {"messages": messages}
    chat.type("More\n")
    chat.expect(f"{FIGURES}\n> ")
    save("it.json", f"saved to {tmp_path}/it.json")
    assert len(json.loads((tmp_path / "it.json").read_text())["messages"]) == 4
    (tmp_path / "mine").write_text("precious")
    save("mine", f"hearth: '{tmp_path}/mine' is not saved: File exists")
    assert (tmp_path / "mine").read_text() == "precious"
    save("none/it", f"hearth: '{tmp_path}/none/it' is not saved: No such file or directory")
    save("it.md", f"saved to {tmp_path}/it.md")
    assert (tmp_path / "it.md").read_text().startswith("## user\n\nHi\n\n## assistant\n\nHello, world\n\n## user")
    assert (tmp_path / "it.md").stat().st_mode & 0o077 == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it.json", "it.md", "mine"]
    chat.type("/save\n")
    chat.expect("hearth: /save takes the name of a file\n> ")


def test_a_conversation_that_outgrows_the_context(chat: program.Terminal, daemon: peer.ScriptedDaemon) -> None:
    detail = peer.bad_request("messages", "70 tokens, over the context of 64")
    overflow = peer.refuse(
        grpc.StatusCode.INVALID_ARGUMENT, "messages: 70 tokens, over the context of 64", details=[detail]
    )
    daemon.script = peer.in_turn(peer.say("ok"), overflow, peer.say("ok"))
    chat.type("one\n")
    chat.expect(f"{FIGURES}\n> ")
    chat.type("two\n")
    chat.expect("hearth: messages: 70 tokens, over the context of 64\n")
    chat.expect(
        "hearth: that turn is not kept; if the conversation is too long for the context of 64 tokens, "
        "/forget drops its oldest part and /reset all of it\n> "
    )
    chat.type("/forget\n")
    chat.expect("dropped 1; 0 left\n> ")
    chat.type("three\n")
    chat.expect(f"{FIGURES}\n> ")
    assert said(daemon.requests[2]) == ["user: three"]


def test_a_full_context_is_told_from_a_limit(chat: program.Terminal, daemon: peer.ScriptedDaemon) -> None:
    reason = chat_pb2.FINISH_REASON_LENGTH
    full = chat_pb2.Usage(prompt_tokens=60, completion_tokens=4)
    daemon.script = peer.in_turn(
        lambda *_: [peer.delta("x"), peer.final(finish_reason=reason)],
        lambda *_: [peer.delta("x"), peer.final(finish_reason=reason, usage=full)],
        lambda *_: [peer.delta("x"), peer.final(finish_reason=chat_pb2.FINISH_REASON_TIME_LIMIT)],
        lambda *_: [peer.delta("x"), peer.final(finish_reason=chat_pb2.FINISH_REASON_POLICY)],
    )
    chat.type("?\n")
    chat.expect("context 13 of 64; cut off: the limit of tokens is reached\n> ")
    chat.type("?\n")
    chat.expect("context 64 of 64; cut off: the context is full, /forget or /reset makes room\n> ")
    chat.type("?\n")
    chat.expect("; cut off: the daemon's limit of time is reached\n> ")
    chat.type("?\n")
    chat.expect("; ended by a rule of the daemon's owner\n> ")


def test_an_error_ends_the_turn_and_not_the_program(chat: program.Terminal, daemon: peer.ScriptedDaemon) -> None:
    def breaks(_: Any, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
        yield peer.delta("half\x1b[2J")
        context.abort(grpc.StatusCode.INTERNAL, "internal error, id 77")

    daemon.script = peer.in_turn(breaks, peer.say("fine"))
    chat.type("one\n")
    chat.expect("half^[[2J\nhearth: internal error, id 77\nhearth: that turn is not kept\n> ")
    chat.type("two\n")
    chat.expect("fine\n")
    assert said(daemon.requests[1]) == ["user: two"]


def test_ctrl_d_ends_in_the_middle_of_a_block(chat: program.Terminal) -> None:
    chat.type('"""\nmore\n')
    chat.expect("more\n. ")
    chat.type("\x04")
    assert chat.wait() == 0


def test_a_conversation_from_a_pipe_prints_answers_only(daemon: peer.ScriptedDaemon) -> None:
    done = program.run("chat", "--address", daemon.address, "--system", "S", stdin=b"one\ntwo\\\nlines\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"Hello, world\nHello, world\n", b"")
    assert said(daemon.requests[1]) == ["system: S", "user: one", "assistant: Hello, world", "user: two\nlines"]


def test_no_daemon_is_an_error_at_the_start(tmp_path: Path) -> None:
    done = program.run("chat", "--address", f"unix://{tmp_path}/none.sock", "--wait", "0")
    assert done.returncode == 1
    assert done.stderr.startswith(b"hearth: cannot reach unix://")


def typed(*lines: str) -> Callable[[str], str]:
    left = iter(lines)
    return lambda _prompt: next(left)


@pytest.mark.parametrize(
    ("lines", "turn"),
    [
        (("plain",), "plain"),
        (("",), ""),
        (("a\\", "b\\", "c"), "a\nb\nc"),
        (("a\\", ""), "a\n"),
        (("ends in two \\\\",), "ends in two \\\\"),
        (("three \\\\\\", "more"), "three \\\\\nmore"),
        (('"""one line"""',), "one line"),
        (('"""', "a", "b", '"""'), "a\nb"),
        (('"""a', "", 'b"""'), "a\n\nb"),
        (('  """', "  indented \\", '"""  '), "  indented \\"),
        (('""""""',), ""),
    ],
)
def test_turns(lines: tuple[str, ...], turn: str) -> None:
    assert read_turn(typed(*lines)) == turn


# What a person can type in one line.
LINE = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]))


@given(st.lists(LINE, min_size=1))
def test_any_lines_can_be_said_in_a_block(lines: list[str]) -> None:
    """But those that hold the quotes themselves, at an end of a line."""
    text = "\n".join(lines)
    if not any(line.rstrip().endswith('"""') for line in lines):
        assert read_turn(typed('"""', *lines, '"""')) == text


@given(st.text())
def test_no_text_can_act_on_a_terminal(text: str) -> None:
    shown = neutralise(text)
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in shown)
    assert neutralise(shown) == shown
    assert "\n" not in neutralise_line(text)
    assert neutralise_line(text).isascii() or not text.isascii()


def test_a_conversation_keeps_questions_only_with_their_answers() -> None:
    conversation = Conversation("S")
    assert [message.role for message in conversation.with_question("q")] == ["system", "user"]
    assert conversation.num_exchanges == 0
    conversation.keep("q", "a")
    assert [message.content for message in conversation.with_question("r")] == ["S", "q", "a", "r"]
    assert conversation.forget(5) == 1
    assert [message.content for message in conversation.messages] == ["S"]
