"""`hearth ask`, `status` and `models` as programs: what goes to stdout, what to stderr, which exit code."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import hearth_program as program
import scripted_daemon as peer
from hearth.v1 import chat_pb2
from tls_files import make_tls_files


@pytest.fixture
def daemon() -> Iterator[peer.ScriptedDaemon]:
    with peer.ScriptedDaemon() as daemon:
        yield daemon


def test_ask_prints_the_answer(daemon: peer.ScriptedDaemon) -> None:
    done = program.run("ask", "--address", daemon.address, "Who", "is", "there?")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"Hello, world\n", b"")
    assert [message.content for message in daemon.requests[0].messages] == ["Who is there?"]


def test_ask_finds_the_daemon_by_the_environment(daemon: peer.ScriptedDaemon) -> None:
    assert program.run("ask", "?", HEARTH_ADDRESS=daemon.address).stdout == b"Hello, world\n"


@pytest.mark.parametrize(
    ("words", "stdin", "question"),
    [
        ((), b"from a pipe\n", "from a pipe"),
        (("Summarise", "this:"), b"line 1\nline 2\n", "Summarise this:\n\nline 1\nline 2"),
        (("only words",), b" \n", "only words"),
        ((), "für\r\nalle\n".encode(), "für\nalle"),
    ],
)
def test_words_and_input_make_the_question(
    daemon: peer.ScriptedDaemon, words: tuple[str, ...], stdin: bytes, question: str
) -> None:
    done = program.run("ask", "--address", daemon.address, *words, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, b"")
    assert daemon.requests[0].messages[0].content == question


def test_a_silent_pipe_beside_words_is_named(daemon: peer.ScriptedDaemon) -> None:
    with subprocess.Popen(
        program.command("ask", "--json", "--address", daemon.address, "hi"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=program.environment(),
    ) as process:
        assert process.stderr
        said = b"hearth: reading standard input to its end; </dev/null if there is none\n"
        assert process.stderr.readline() == said
        assert daemon.requests == []
        out, err = process.communicate(b"more\n", timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert json.loads(out)["text"] == "Hello, world"
    assert daemon.requests[0].messages[0].content == "hi\n\nmore"


def test_ask_takes_every_option(daemon: peer.ScriptedDaemon) -> None:
    options = "--model tiny --system Brief. --max-tokens 7 --temperature 0 --top-k 3 --top-p 0.5 --min-p 0.25 "
    options += "--repetition-penalty 1.5 --presence-penalty -0.5 --frequency-penalty 0.5 --seed 9 --stop a --stop b "
    options += "--top-logprobs 0 --request-id r:1"
    done = program.run("ask", "--address", daemon.address, *options.split(), "--", "-1?")
    assert done.returncode == 0, done.stderr
    assert daemon.requests == [
        chat_pb2.ChatRequest(
            model="tiny",
            messages=[
                chat_pb2.Message(role=chat_pb2.ROLE_SYSTEM, content="Brief."),
                chat_pb2.Message(role=chat_pb2.ROLE_USER, content="-1?"),
            ],
            sampling=chat_pb2.SamplingOptions(
                max_tokens=7,
                temperature=0,
                top_k=3,
                top_p=0.5,
                min_p=0.25,
                repetition_penalty=1.5,
                presence_penalty=-0.5,
                frequency_penalty=0.5,
                seed=9,
                stop=["a", "b"],
                top_logprobs=0,
            ),
            request_id="r:1",
        )
    ]


def test_ask_json_is_one_object(daemon: peer.ScriptedDaemon) -> None:
    token = chat_pb2.TokenProbability(token_id=5, text=b"\xc3", logprob=-0.5)
    daemon.script = lambda *_: [
        peer.delta("é\n", chat_pb2.TokenLogprob(chosen=token, top=[token])),
        peer.final(finish_reason=chat_pb2.FINISH_REASON_STOP_STRING),
    ]
    expected: dict[str, Any] = {
        "text": "é\n",
        "finish_reason": "stop_string",
        "usage": {
            "prompt_tokens": 10,
            "cached_prompt_tokens": 4,
            "completion_tokens": 3,
            "drafted_tokens": 0,
            "accepted_tokens": 0,
        },
        "timings": {
            "queue_seconds": 0.001,
            "prefill_seconds": 0.02,
            "time_to_first_token_seconds": 0.025,
            "decode_seconds": 0.05,
            "decode_tokens_per_second": 40.0,
            "paused_seconds": 0.0,
            "longest_gap_seconds": 0.0,
        },
        "request_id": "r-1",
        "model": "tiny",
        "throttled": False,
    }
    probability = {"token_id": 5, "text": "\ufffd", "bytes": [195], "logprob": -0.5}
    for encoding in ("utf-8", "ascii"):
        done = program.run("ask", "--json", "--address", daemon.address, "?", PYTHONIOENCODING=encoding)
        assert done.stdout.count(b"\n") == 1
        printed = json.loads(done.stdout)
        assert printed.pop("token_logprobs") == [{"chosen": probability, "top": [probability]}]
        assert printed == expected


def test_an_answer_comes_piece_by_piece(daemon: peer.ScriptedDaemon) -> None:
    go_on = threading.Event()

    def script(*_: Any) -> Iterator[chat_pb2.ChatResponse]:
        yield peer.delta("first")
        assert go_on.wait(20)
        yield peer.delta(" second")
        yield peer.final()

    daemon.script = script
    with subprocess.Popen(
        program.command("ask", "--address", daemon.address, "?"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=program.environment(),
    ) as process:
        assert process.stdout
        assert os.read(process.stdout.fileno(), 100) == b"first"
        go_on.set()
        assert process.stdout.read() == b" second\n"
    assert process.returncode == 0


def test_ctrl_c_keeps_what_was_printed(daemon: peer.ScriptedDaemon) -> None:
    def script(_: Any, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
        yield peer.delta("half")
        peer.wait_for_end(context)

    daemon.script = script
    with subprocess.Popen(
        program.command("ask", "--address", daemon.address, "?"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=program.environment(),
    ) as process:
        assert process.stdout
        assert process.stderr
        assert os.read(process.stdout.fileno(), 100) == b"half"
        process.send_signal(signal.SIGINT)
        assert (process.stdout.read(), process.stderr.read()) == (b"\n", b"")
    assert process.returncode == 130
    assert daemon.chat_ended.wait(5)


def test_a_broken_pipe_is_quiet(daemon: peer.ScriptedDaemon) -> None:
    reader_is_gone = threading.Event()

    def script(*_: Any) -> Iterator[chat_pb2.ChatResponse]:
        yield peer.delta("first\n")
        assert reader_is_gone.wait(20)
        yield peer.delta("second\n")
        yield peer.final()

    daemon.script = script
    with subprocess.Popen(
        program.command("ask", "--address", daemon.address, "?"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=program.environment(),
    ) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"first\n"
        process.stdout.close()
        reader_is_gone.set()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_what_stdout_cannot_show_becomes_a_question_mark(daemon: peer.ScriptedDaemon) -> None:
    daemon.script = peer.say("café 🔥 ok")
    done = program.run("ask", "--address", daemon.address, "?", PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stdout) == (0, "café ? ok\n".encode("latin-1"))


def test_input_is_read_in_the_terminals_encoding(daemon: peer.ScriptedDaemon) -> None:
    done = program.run("ask", "--address", daemon.address, stdin=b"caf\xe9", PYTHONIOENCODING="latin-1", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert daemon.requests[0].messages[0].content == "café"
    done = program.run("ask", "--address", daemon.address, stdin=b"caf\xe9")
    assert done.returncode == 2
    assert done.stderr == b"hearth: standard input is not utf-8 text: byte 0xe9 at 3\n"


def test_escape_sequences_reach_a_pipe_and_no_terminal(daemon: peer.ScriptedDaemon) -> None:
    text = "\x1b]0;evil\x07\x1b[31mred\x9b\x7f\ttab"
    daemon.script = peer.say(*text)
    assert program.run("ask", "--address", daemon.address, "?").stdout == f"{text}\n".encode()
    with program.Terminal("ask", "--address", daemon.address, "?") as terminal:
        terminal.expect("^[]0;evil^G^[[31mred\\x9b^?")
        assert terminal.wait() == 0
        assert "\x1b" not in terminal.shown


def test_a_daemons_words_cannot_act_on_the_terminal(daemon: peer.ScriptedDaemon) -> None:
    daemon.script = peer.refuse(grpc.StatusCode.NOT_FOUND, "no model \x1b[2J\x85x")
    done = program.run("ask", "--address", daemon.address, "?")
    assert (done.returncode, done.stderr) == (1, b"hearth: no model ^[[2J x\n")


def test_an_error_in_mid_answer_stands_on_its_own_line(daemon: peer.ScriptedDaemon) -> None:
    def script(_: Any, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
        yield peer.delta("half")
        context.abort(grpc.StatusCode.INTERNAL, "internal error, id 77")

    daemon.script = script
    done = program.run("ask", "--address", daemon.address, "?")
    assert (done.returncode, done.stdout, done.stderr) == (1, b"half\n", b"hearth: internal error, id 77\n")


def test_waiting_is_told_to_a_person_only(daemon: peer.ScriptedDaemon) -> None:
    daemon.script = lambda *_: [peer.queued(2), peer.queued(1, 3400.0), peer.delta("at last"), peer.final()]
    assert program.run("ask", "--address", daemon.address, "?").stderr == b""
    with program.Terminal("ask", "--address", daemon.address, "?") as terminal:
        terminal.expect("waiting; 2 before this one\n")
        terminal.expect("waiting; 1 before this one, about 3 s\n")
        terminal.expect("at last\n")
        assert terminal.wait() == 0


def test_a_cut_answer_is_told_to_a_person(daemon: peer.ScriptedDaemon) -> None:
    daemon.script = lambda *_: [peer.delta("at la"), peer.final(finish_reason=chat_pb2.FINISH_REASON_LENGTH)]
    with program.Terminal("ask", "--address", daemon.address, "?") as terminal:
        terminal.expect("at la\nthe answer may break off")
        assert terminal.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ask", "--address", "nowhere", "?"), b"hearth: address 'nowhere': the port is missing"),
        (("ask", "--address", "127.0.0.1:1", "--ca", "/none", "?"), b"hearth: CA file '/none' cannot be read"),
        (("ask", "--address", "10.0.0.1:1", "--token-file", __file__, "?"), b"hearth: token file"),
        (("ask",), b"hearth: there is no question"),
        (("ask", "--timeout", "0", "?"), b"--timeout: 0 is not a number of seconds over 0"),
        (("ask", "--timeout", "soon", "?"), b"--timeout: invalid number of seconds value: 'soon'"),
        (("ask", "--wait", "nan", "?"), b"--wait: nan is not a number of seconds"),
        (("ask", "--max-tokens", "many", "?"), b"--max-tokens"),
        (("status", "--wait", "1"), b"unrecognized arguments: --wait"),
        (("ask", "--top-x", "1", "?"), b"--top-x"),
        (("sing",), b"invalid choice: 'sing'"),
        ((), b"required: COMMAND"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...], said: bytes) -> None:
    done = program.run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert done.stdout == b""


def test_an_error_is_exit_code_1_and_one_line(daemon: peer.ScriptedDaemon, tmp_path: Path) -> None:
    daemon.script = peer.refuse(grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p: 3.0 is over 1")
    done = program.run("ask", "--address", daemon.address, "--top-p", "3", "?")
    assert (done.returncode, done.stderr) == (1, b"hearth: sampling.top_p: 3.0 is over 1\n")
    done = program.run("ask", "--address", f"unix://{tmp_path}/x.sock", "--wait", "0.2", "?")
    said = f"hearth: cannot reach unix://{tmp_path}/x.sock: there is no such socket; is hearthd running?\n"
    assert (done.returncode, done.stderr) == (1, said.encode())
    done = program.run("status", "--address", "no-such-host.invalid:1")
    assert done.stderr == b"hearth: cannot reach no-such-host.invalid:1: the name is not known\n"
    done = program.run("ask", "--address", daemon.address, "\udcff")
    assert (done.returncode, done.stderr) == (1, b"hearth: messages[0].content holds bytes that are not UTF-8 text\n")


def test_a_deadline_is_exit_code_1(daemon: peer.ScriptedDaemon) -> None:
    daemon.script = lambda _, context: (peer.wait_for_end(context), [])[1]
    done = program.run("ask", "--address", daemon.address, "--timeout", "0.3", "?")
    assert done.returncode == 1
    assert b"did not finish in time; allow more with timeout (--timeout)" in done.stderr


def test_over_the_network_with_certificate_and_token(tmp_path: Path) -> None:
    files = make_tls_files(tmp_path)
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    stranger = make_tls_files(strangers)
    (tmp_path / "token").write_text("s3cret\n")
    credentials = grpc.ssl_server_credentials([(files.key.read_bytes(), files.certificate.read_bytes())])
    token = ("--token-file", f"{tmp_path}/token")
    with peer.ScriptedDaemon(credentials=credentials, token="s3cret") as daemon:
        done = program.run("ask", "--address", daemon.address, "--ca", str(files.ca), *token, "?")
        assert (done.returncode, done.stdout, done.stderr) == (0, b"Hello, world\n", b"")
        done = program.run("ask", "--address", daemon.address, "--ca", str(files.ca), "?")
        assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
        assert done.stderr.startswith(b"hearth: no token that this daemon knows\n")
        # gRPC's own log would say it once more, in many words.
        done = program.run("ask", "--address", daemon.address, "--ca", str(stranger.ca), *token, "?")
        said = f"hearth: cannot reach {daemon.address}: its certificate is not signed by that of the CA file\n"
        assert (done.returncode, done.stderr) == (1, said.encode())


def test_a_missing_token_is_told_with_this_programs_options(daemon: peer.ScriptedDaemon) -> None:
    said = "no valid credential: send the metadata `authorization: Bearer TOKEN`; `hearthd token create` makes a token"
    daemon.script = peer.refuse(grpc.StatusCode.UNAUTHENTICATED, said)
    done = program.run("ask", "--address", daemon.address, "?")
    told = (
        "hearth: no valid credential: give --token-file FILE or HEARTH_TOKEN with a token that is valid (`hearthd "
        "token create NAME` on the daemon's machine makes one), or pair this device: `hearthd pair NAME` there, and "
        "here `hearth pair CODE`\n"
    )
    assert (done.returncode, done.stderr.decode()) == (1, told)


def test_status(daemon: peer.ScriptedDaemon) -> None:
    done = program.run("status", "--address", daemon.address)
    assert done.returncode == 0
    assert done.stdout.decode().splitlines() == [
        f"daemon  hearthd 1.2.3 at {daemon.address}",
        "state   serving",
        "model   tiny",
        "up      1 day, 2:03:04",
        "memory  300 MiB",
        "chats   1 of 2 running, 3 of 8 waiting; 4 finished, 5 cancelled, 6 refused, 7 failed",
        "tokens  800 read, of which 200 from the cache; 90 written",
    ]
    printed = json.loads(program.run("status", "--json", "--address", daemon.address).stdout)
    assert (printed["address"], printed["state"], printed["num_running"]) == (daemon.address, "serving", 1)
    assert printed["uptime_seconds"] == 93_784.5


def test_models(daemon: peer.ScriptedDaemon) -> None:
    done = program.run("models", "--address", daemon.address)
    assert done.returncode == 0
    lines = done.stdout.decode().splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "NAME STATE ARCHITECTURE PARAMETERS WEIGHTS CONTEXT SIZE MEMORY LICENCE",
        "tiny loaded LlamaForCausalLM 135 M int8 64 138 MB 210 MB Apache-2.0",
        # Of a model whose bundle cannot be read nothing is known but its name.
        "other failed - - - - - - -",
    ]
    printed = json.loads(program.run("models", "--json", "--address", daemon.address).stdout)
    assert [model["name"] for model in printed["models"]] == ["tiny", "other"]
    assert printed["models"][0]["default_sampling"]["min_p"] is None
    assert [model["state"] for model in printed["models"]] == ["loaded", "failed"]


def test_help_is_quick_and_says_what_a_script_needs() -> None:
    done = program.run("--help")
    assert done.returncode == 0
    for said in (b"ask", b"chat", b"status", b"models", b"HEARTH_ADDRESS", b"unix:///", b"130  interrupted"):
        assert said in done.stdout
    text = b" ".join(done.stdout.split())
    assert b"1 an error; one line on standard error says which. Also a question or an option's value that the d" in text
    assert b"2 wrong usage that the program sees by itself" in text
    for name in ("ask", "chat", "status", "models"):
        text = program.run(name, "--help").stdout
        assert b"--address" in text
        assert (b"--wait" in text) == (name != "status")
    code = "import sys\nfrom hearth.__main__ import main\n"
    code += "try: main(['ask', '--help'])\nfinally: print(*sys.modules, file=sys.stderr)"
    loaded = subprocess.run([sys.executable, "-c", code], env=program.environment(), capture_output=True, check=True)
    assert not set(loaded.stderr.decode().split()) & {"grpc", "google.protobuf", "asyncio", "importlib.metadata"}


def test_version() -> None:
    assert program.run("--version").stdout.startswith(b"hearth ")


def test_a_closed_stdin_and_stdout_do_no_harm(daemon: peer.ScriptedDaemon) -> None:
    shell = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&-', "sh", *program.command("ask", "--address", daemon.address, "?")],
        env=program.environment(),
        stderr=subprocess.PIPE,
        timeout=60,
    )
    assert shell.stderr == b""
    assert shell.returncode == 0


def test_nobody_there_is_told_while_it_is_waited_for() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with program.Terminal("models", "--address", address, "--wait", "0.3") as terminal:
            terminal.expect(
                f"cannot reach {address}: nobody listens there; is hearthd running? (waiting up to 0.3 s)\n"
            )
            terminal.expect(f"hearth: cannot reach {address}: nobody listens there; is hearthd running?\n")
            assert terminal.wait() == 1
