"""The client's surface against a scripted daemon on a real socket: what goes out, what comes back."""

from __future__ import annotations

import ast
import inspect
import os
import pickle
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import hearth
import scripted_daemon as peer
from client_kinds import KINDS, Connect
from hearth.v1 import chat_pb2

CLIENT = Path(__file__).resolve().parent.parent / "client"


@pytest.fixture
def daemon() -> Iterator[peer.ScriptedDaemon]:
    with peer.ScriptedDaemon() as daemon:
        yield daemon


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest) -> Connect:
    return KINDS[request.param]


def test_a_question_gets_its_answer(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    with connect(daemon.address) as client:
        answer = client.chat("Who is there?")
    assert answer == hearth.Answer(
        text="Hello, world",
        finish_reason=hearth.FinishReason.END_OF_TURN,
        usage=hearth.Usage(prompt_tokens=10, cached_prompt_tokens=4, completion_tokens=3),
        timings=hearth.Timings(
            queue_seconds=0.001,
            prefill_seconds=0.02,
            time_to_first_token_seconds=0.025,
            decode_seconds=0.05,
            decode_tokens_per_second=40.0,
        ),
        request_id="r-1",
        model="tiny",
    )
    assert daemon.requests == [
        chat_pb2.ChatRequest(messages=[chat_pb2.Message(role=chat_pb2.ROLE_USER, content="Who is there?")])
    ]


def test_every_option_reaches_the_daemon(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    conversation = (
        hearth.Message("system", "Be brief."),
        hearth.Message("user", "Hi"),
        hearth.Message("assistant", "Hello"),
        hearth.Message("user", "Bye"),
    )
    with connect(daemon.address) as client:
        client.chat(
            iter(conversation),
            model="tiny",
            temperature=0.0,
            top_k=40,
            top_p=0.5,
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=-0.5,
            frequency_penalty=0.75,
            seed=2**64 - 1,
            max_tokens=7,
            stop=["\n", "END"],
            top_logprobs=0,
            request_id="mine-1",
        )
        client.chat("Hi", stop="one", temperature=None, model=None)
    full, sparse = daemon.requests
    roles = [chat_pb2.ROLE_SYSTEM, chat_pb2.ROLE_USER, chat_pb2.ROLE_ASSISTANT, chat_pb2.ROLE_USER]
    assert [(message.role, message.content) for message in full.messages] == [
        (role, message.content) for role, message in zip(roles, conversation, strict=True)
    ]
    assert (full.model, full.request_id) == ("tiny", "mine-1")
    assert full.sampling == chat_pb2.SamplingOptions(
        temperature=0.0,
        top_k=40,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
        seed=2**64 - 1,
        max_tokens=7,
        stop=["\n", "END"],
        top_logprobs=0,
    )
    # A field that is set to 0 is not a field that is not set.
    assert full.sampling.HasField("temperature")
    assert full.sampling.HasField("top_logprobs")
    assert sparse.sampling == chat_pb2.SamplingOptions(stop=["one"])


def test_options_and_protocol_name_the_same_things() -> None:
    in_protocol = {field.name for field in chat_pb2.SamplingOptions.DESCRIPTOR.fields}
    assert set(hearth.ChatOptions.__annotations__) == in_protocol | {"model", "request_id", "priority"}


def test_a_stream_gives_piece_after_piece_and_then_the_answer(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    chosen = chat_pb2.TokenProbability(token_id=5, text=b"\xf0\x9f", logprob=-0.5)
    other = chat_pb2.TokenProbability(token_id=6, text=b"x", logprob=-1.5)
    entry = chat_pb2.TokenLogprob(chosen=chosen, top=[chosen, other])
    daemon.script = lambda *_: [
        peer.queued(2),
        peer.queued(0, 1500.0),
        peer.delta("", entry),
        peer.delta("🔥", entry),
        peer.final(finish_reason=chat_pb2.FINISH_REASON_LENGTH),
    ]
    places: list[hearth.Queued] = []
    with connect(daemon.address) as client:
        stream = client.stream("?", top_logprobs=1, on_queued=places.append)
        assert daemon.requests == []
        with pytest.raises(RuntimeError, match="not complete"):
            _ = stream.answer
        first = next(stream)
        assert places == [hearth.Queued(2, None), hearth.Queued(0, 1.5)]
        assert stream.text == ""
        rest = list(stream)
        assert list(stream) == []
        answer = stream.answer
    expected = hearth.TokenLogprob(
        chosen=hearth.TokenProbability(5, b"\xf0\x9f", -0.5),
        top=(hearth.TokenProbability(5, b"\xf0\x9f", -0.5), hearth.TokenProbability(6, b"x", -1.5)),
    )
    assert first == hearth.Delta("", (expected,))
    assert rest == [hearth.Delta("🔥", (expected,))]
    assert (answer.text, answer.token_logprobs) == ("🔥", (expected, expected))
    assert answer.finish_reason is hearth.FinishReason.LENGTH


def test_a_fast_answer_loses_nothing(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    """The call may be over before its first response is read."""
    texts = [f"{number} " for number in range(500)]
    daemon.script = peer.say(*texts)
    with connect(daemon.address) as client:
        stream = client.stream("count")
        assert next(stream).text == "0 "
        assert daemon.chat_ended.wait(10)
        assert stream.read().text == "".join(texts)


def test_the_small_calls(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    with connect(daemon.address) as client:
        models = client.models()
        assert [model.name for model in models] == ["tiny", "other"]
        model = client.model()
        assert model == client.model("tiny") == models[0]
        assert (model.context_length, model.num_parameters, model.limits.default_max_tokens) == (64, 134_515_008, 32)
        assert (model.limits.max_prompt_tokens, model.limits.max_tokens) == (60, 16)
        # The daemon set top_k to 0, and said nothing of min_p.
        assert (model.default_sampling.top_k, model.default_sampling.min_p) == (0, None)
        assert client.count_tokens("abc") == 3
        assert client.count_tokens([hearth.Message("user", "abc")]) == 1001
        status = client.status()
        assert (status.state, status.uptime_seconds) == (hearth.DaemonState.SERVING, 93_784.5)
        assert (status.num_running, status.num_queued, status.num_chats_cancelled) == (1, 3, 5)
        assert client.health() is hearth.Health.SERVING
        daemon.health.enter_graceful_shutdown()
        assert client.health() is hearth.Health.NOT_SERVING


def test_what_a_newer_daemon_adds_does_no_harm(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    unknown_event = chat_pb2.ChatResponse.FromString(b"\x7a\x01x")
    daemon.script = lambda *_: [unknown_event, peer.delta("ok"), peer.final(finish_reason=99)]
    with connect(daemon.address) as client:
        answer = client.chat("?")
    assert (answer.text, answer.finish_reason) == ("ok", hearth.FinishReason.UNKNOWN)


def test_works_over_a_unix_socket(connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Characters that mean something in a URI, and a letter beyond ASCII.
    path = tmp_path / "a %41#?é b"
    # gRPC's own server wants the path quoted as well; a plain name serves both, found through a link.
    plain = tmp_path / "plain.sock"
    with peer.ScriptedDaemon(address=f"unix://{plain}") as daemon:
        path.symlink_to(plain)
        with connect(f"unix://{path}") as client:
            assert client.chat("?").text == "Hello, world"
        monkeypatch.setenv("HEARTH_ADDRESS", daemon.address)
        with connect() as client:
            assert client.health() is hearth.Health.SERVING


def test_works_over_ipv6(connect: Connect) -> None:
    with peer.ScriptedDaemon(address="[::1]:0") as daemon, connect(daemon.address) as client:
        assert client.chat("?").text == "Hello, world"


@pytest.mark.parametrize(
    ("arguments", "options", "field"),
    [
        ("?", {"max_tokens": 2**40}, "sampling.max_tokens"),
        ("?", {"seed": -1}, "sampling.seed"),
        ("\udcff", {}, "messages[0].content"),
        ("?", {"stop": ["ok", "\ud800"]}, "sampling.stop[1]"),
        ([hearth.Message("user", "?"), hearth.Message("tool", "?")], {}, "messages[1].role"),  # type: ignore[arg-type]
    ],
)
def test_what_the_protocol_cannot_carry_is_refused_by_name(
    daemon: peer.ScriptedDaemon, connect: Connect, arguments: typing.Any, options: typing.Any, field: str
) -> None:
    with connect(daemon.address) as client:
        with pytest.raises(hearth.InvalidRequestError) as caught:
            client.chat(arguments, **options)
        assert caught.value.field == field
        assert field in str(caught.value)
    assert daemon.requests == []


def test_a_misspelt_option_is_an_error(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    with connect(daemon.address) as client:
        with pytest.raises(TypeError, match="unknown option 'temprature'"):
            client.chat("?", temprature=1)
        with pytest.raises(TypeError, match=r"messages\[0\] is of type dict"):
            client.chat([{"role": "user", "content": "?"}])
    with pytest.raises(TypeError, match="unknown option 'tokn'"):
        connect(daemon.address, tokn="x")


def test_the_public_names() -> None:
    assert hearth.__all__ == sorted(hearth.__all__)
    assert {
        name for name in dir(hearth) if not name.startswith("_") and name not in ("v1", "cli", "TYPE_CHECKING")
    } == set(hearth.__all__)
    for name in hearth.__all__:
        assert getattr(hearth, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Clent'"):
        _ = hearth.Clent  # type: ignore[attr-defined]


def test_the_drawn_error_tree_is_the_real_one() -> None:
    from hearth import _errors

    drawn = [line for line in (_errors.__doc__ or "").splitlines() if "── " in line]
    parents: list[str] = ["HearthError"]
    for line in drawn:
        depth = line.index("── ") // 4
        name = line.split("── ")[1].split()[0]
        parents[depth:] = [name]
        assert getattr(hearth, name).__bases__ == (getattr(hearth, parents[depth - 1]),)
    assert len(drawn) + 1 == len(_errors.__all__)
    assert set(_errors.__all__) <= set(hearth.__all__)


def test_errors_can_be_pickled() -> None:
    for error in (hearth.QueueFullError("full", retry_after=1.5), hearth.QuotaExceededError("full", retry_after=1.5)):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.retry_after) == (type(error), "full", 1.5)


def test_no_grpc_type_in_a_public_signature() -> None:
    for name in hearth.__all__:
        value = getattr(hearth, name)
        if not inspect.isclass(value):
            continue
        for attribute, function in inspect.getmembers(value):
            if attribute.startswith("_") and attribute not in ("__init__", "__next__", "__anext__"):
                continue
            function = function.fget if isinstance(function, property) else function
            if inspect.isfunction(function):
                assert "grpc" not in str(inspect.signature(function)), f"{name}.{attribute}"
                assert "pb2" not in str(inspect.signature(function)), f"{name}.{attribute}"


def test_both_clients_offer_the_same() -> None:
    def surface(kind: type) -> dict[str, list[str]]:
        return {
            name.removeprefix("a") if name == "aclose" else name: list(inspect.signature(member).parameters)
            for name, member in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert surface(hearth.Client) == surface(hearth.AsyncClient)
    assert surface(hearth.ChatStream) == surface(hearth.AsyncChatStream)


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(CLIENT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in run.stdout.split()}


def test_importing_is_cheap() -> None:
    assert not loaded_by("import hearth") & {"grpc", "google", "numpy", "onnxruntime", "hearthd", "asyncio"}
    needed = loaded_by("from hearth import Client, AsyncClient; import hearth._client, hearth._async_client")
    assert "grpc" in needed
    assert not needed & {"numpy", "onnxruntime", "hearthd", "tokenizers"}


def test_the_client_needs_nothing_but_its_two_dependencies() -> None:
    allowed = set(sys.stdlib_module_names) | {"grpc", "google", "hearth"}
    for path in (CLIENT / "hearth").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            for name in names:
                # The extra [discover], which _discovery asks for by name before it imports it.
                extra = {"zeroconf"} if path.name == "_discovery.py" else set()
                assert name.partition(".")[0] in allowed | extra, f"{path.name} imports {name}"
                if name.startswith("google."):
                    assert name.startswith("google.protobuf"), f"{path.name} imports {name}"
