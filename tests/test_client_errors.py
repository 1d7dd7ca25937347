"""Every failure of the daemon, as it arrives over a real socket, becomes one error of the tree, for both clients."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hearth
import scripted_daemon as peer
from client_kinds import KINDS, Connect
from hearth._translate import translate
from hearth.v1 import chat_pb2

CODE = grpc.StatusCode


@pytest.fixture
def daemon() -> Iterator[peer.ScriptedDaemon]:
    with peer.ScriptedDaemon() as daemon:
        yield daemon


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest) -> Connect:
    return KINDS[request.param]


def error_of(daemon: peer.ScriptedDaemon, connect: Connect, script: peer.Script, **options: Any) -> hearth.HearthError:
    daemon.script = script
    with connect(daemon.address, **options) as client, pytest.raises(hearth.HearthError) as caught:
        client.chat("a secret question")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    return caught.value


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (CODE.INVALID_ARGUMENT, hearth.InvalidRequestError),
        (CODE.NOT_FOUND, hearth.ModelNotFoundError),
        (CODE.UNAUTHENTICATED, hearth.AuthenticationError),
        (CODE.PERMISSION_DENIED, hearth.PermissionDeniedError),
        (CODE.RESOURCE_EXHAUSTED, hearth.LimitExceededError),
        (CODE.UNAVAILABLE, hearth.UnavailableError),
        (CODE.DEADLINE_EXCEEDED, hearth.DeadlineError),
        (CODE.CANCELLED, hearth.UnavailableError),
        (CODE.INTERNAL, hearth.InternalError),
        (CODE.UNKNOWN, hearth.InternalError),
        (CODE.DATA_LOSS, hearth.InternalError),
        (CODE.UNIMPLEMENTED, hearth.ProtocolError),
        (CODE.ABORTED, hearth.ProtocolError),
        (CODE.OUT_OF_RANGE, hearth.ProtocolError),
    ],
)
def test_each_status_is_one_error(
    daemon: peer.ScriptedDaemon, connect: Connect, code: grpc.StatusCode, kind: type[hearth.HearthError]
) -> None:
    error = error_of(daemon, connect, peer.refuse(code, "what\nwas  wrong"), ready_timeout=0)
    assert type(error) is kind
    if code is not CODE.CANCELLED:
        assert "what was wrong" in str(error)
    assert type(error_of(daemon, connect, peer.refuse(code), ready_timeout=0)) is kind


def test_a_deadline_that_the_daemon_refuses_is_told_in_its_words_and_one_that_passed_in_ours(
    daemon: peer.ScriptedDaemon, connect: Connect
) -> None:
    text = "the answer would begin in about 4.0 s, and the deadline is in 0.3 s: give more time"
    error = error_of(daemon, connect, peer.refuse(CODE.DEADLINE_EXCEEDED, text), timeout=30)
    assert (type(error), str(error)) == (hearth.DeadlineError, text)

    ours = f"the daemon at {daemon.address} did not finish in time; allow more with timeout (--timeout)"
    passed = error_of(daemon, connect, lambda _, context: (peer.wait_for_end(context), [])[1], timeout=0.3)
    assert (type(passed), str(passed)) == (hearth.DeadlineError, ours)
    for said in ("", "Deadline Exceeded", "Stream removed (Deadline Exceeded)"):
        assert str(error_of(daemon, connect, peer.refuse(CODE.DEADLINE_EXCEEDED, said), timeout=30)) == ours


def test_a_wrong_field_is_named(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    detail = peer.bad_request("sampling.top_p", "2.0 is over 1")
    error = error_of(daemon, connect, peer.refuse(CODE.INVALID_ARGUMENT, "top_p: 2.0 is over 1", details=[detail]))
    assert isinstance(error, hearth.InvalidRequestError)
    assert (error.field, str(error)) == ("sampling.top_p", "top_p: 2.0 is over 1")
    silent = error_of(daemon, connect, peer.refuse(CODE.INVALID_ARGUMENT, details=[detail]))
    assert str(silent) == "sampling.top_p: 2.0 is over 1"


def test_a_fault_of_the_daemon_carries_its_id(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    error = error_of(
        daemon, connect, peer.refuse(CODE.INTERNAL, "a fault of the daemon, incident 3f2a-9c; its journal says more")
    )
    assert isinstance(error, hearth.InternalError)
    assert error.error_id == "3f2a-9c"


@pytest.mark.parametrize("number_of_responses", [0, 1])
def test_a_stream_without_its_end_is_no_answer(
    daemon: peer.ScriptedDaemon, connect: Connect, number_of_responses: int
) -> None:
    daemon.script = lambda *_: [peer.delta("half")][:number_of_responses]
    with connect(daemon.address) as client, pytest.raises(hearth.ProtocolError, match="without the end"):
        client.chat("?")


def test_more_after_the_end_is_refused(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    daemon.script = lambda *_: [peer.final(), peer.delta("more")]
    with connect(daemon.address) as client, pytest.raises(hearth.ProtocolError, match="after the end"):
        client.chat("?")


def test_bytes_that_are_no_response_are_refused(connect: Connect) -> None:
    handler = grpc.unary_stream_rpc_method_handler(lambda *_: iter([b"\xff\xff\xff"]))
    small = grpc.unary_unary_rpc_method_handler(lambda *_: b"\xff\xff\xff")

    class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, call: Any) -> Any:
            return handler if call.method.endswith("/Chat") else small

    from concurrent import futures

    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers([Handlers()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with connect(f"127.0.0.1:{port}") as client:
            with pytest.raises(hearth.ProtocolError, match="3 bytes that are no ChatResponse"):
                client.chat("?")
            for call in (client.models, client.model, client.status, client.health):
                with pytest.raises(hearth.ProtocolError, match="3 bytes"):
                    call()
    finally:
        server.stop(0).wait()


def test_a_full_queue_is_tried_again_when_the_daemon_says(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    full = peer.refuse(CODE.RESOURCE_EXHAUSTED, "8 chats wait", pushback="30", details=[peer.retry_info(99)])
    by_detail = peer.refuse(CODE.RESOURCE_EXHAUSTED, "8 chats wait", details=[peer.retry_info(0.02)])
    daemon.script = peer.in_turn(full, by_detail, full, peer.say("at last"))
    with connect(daemon.address) as client:
        assert client.chat("?").text == "at last"
    assert len(daemon.requests) == 4


def test_a_queue_that_stays_full_is_reported(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    script = peer.refuse(CODE.RESOURCE_EXHAUSTED, "8 chats wait, at most 8 may", pushback="20")
    error = error_of(daemon, connect, script, max_retries=2)
    assert isinstance(error, hearth.QueueFullError)
    assert (str(error), error.retry_after) == ("8 chats wait, at most 8 may", 0.02)
    assert len(daemon.requests) == 3


def test_a_rate_is_waited_for_and_a_quota_of_the_day_is_reported_in_the_daemons_words(
    daemon: peer.ScriptedDaemon, connect: Connect
) -> None:
    failure = peer.quota_failure("caller:phone", "requests_per_minute = 30 of role guest")
    text = "phone has made its 30 calls of a minute (requests_per_minute of role guest); try again in 2 seconds"
    rate = peer.refuse(CODE.RESOURCE_EXHAUSTED, text, pushback="20", details=[peer.retry_info(0.02), failure])
    daemon.script = peer.in_turn(rate, peer.say("at last"))
    with connect(daemon.address) as client:
        assert client.chat("?").text == "at last"

    error = error_of(daemon, connect, rate, max_retries=0)
    assert type(error) is hearth.QuotaExceededError
    assert (str(error), error.retry_after) == (text, 0.02)

    daemon.requests.clear()
    text = "phone has used its 1000 tokens of today (tokens_per_day of role guest); try again in 5 hours"
    day = peer.refuse(CODE.RESOURCE_EXHAUSTED, text, pushback="18000000", details=[peer.retry_info(18000), failure])
    error = error_of(daemon, connect, day, timeout=float("inf"))
    assert type(error) is hearth.QuotaExceededError
    assert (str(error), error.retry_after) == (text, 18000)
    assert len(daemon.requests) == 1


@pytest.mark.parametrize("pushback", ["-1", "soon"])
def test_a_daemon_that_wants_no_other_attempt_gets_none(
    daemon: peer.ScriptedDaemon, connect: Connect, pushback: str
) -> None:
    error = error_of(daemon, connect, peer.refuse(CODE.RESOURCE_EXHAUSTED, "full", pushback=pushback))
    assert isinstance(error, hearth.QueueFullError)
    assert error.retry_after is None
    assert len(daemon.requests) == 1


def test_a_limit_that_waiting_cannot_lift_is_no_full_queue(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    error = error_of(daemon, connect, peer.refuse(CODE.RESOURCE_EXHAUSTED, "the stream is read too slowly"))
    assert not isinstance(error, hearth.QueueFullError)
    assert len(daemon.requests) == 1


def test_a_request_that_is_too_large_is_said_in_numbers(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    with connect(daemon.address) as client, pytest.raises(hearth.LimitExceededError) as caught:
        client.chat("x" * (4 << 20))
    assert str(caught.value) == "the request has 4194316 bytes; the daemon takes at most 4194304"
    assert daemon.requests == []


def test_an_attempt_that_could_only_come_after_the_deadline_is_not_waited_for(
    daemon: peer.ScriptedDaemon, connect: Connect
) -> None:
    script = peer.refuse(CODE.RESOURCE_EXHAUSTED, "full", pushback="3600000")
    assert isinstance(error_of(daemon, connect, script, timeout=30), hearth.QueueFullError)


@pytest.mark.parametrize("first", [peer.queued(1), peer.delta("half")], ids=["queued", "delta"])
@pytest.mark.parametrize("code", [CODE.UNAVAILABLE, CODE.RESOURCE_EXHAUSTED])
def test_nothing_is_tried_again_after_the_first_response(
    daemon: peer.ScriptedDaemon, connect: Connect, first: chat_pb2.ChatResponse, code: grpc.StatusCode
) -> None:
    def script(_: Any, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
        yield first
        peer.abort(context, code, "over", pushback="10")

    error = error_of(daemon, connect, script)
    assert isinstance(error, hearth.UnavailableError | hearth.QueueFullError)
    assert len(daemon.requests) == 1


def test_a_loading_daemon_is_waited_for(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    loading = peer.refuse(CODE.UNAVAILABLE, "loading the model")
    daemon.script = peer.in_turn(loading, loading, peer.say("ready"))
    with connect(daemon.address) as client:
        assert client.chat("?").text == "ready"
        left = iter([True, True])
        daemon.small_call = lambda context: context.abort(CODE.UNAVAILABLE, "loading") if next(left, False) else None
        assert client.count_tokens("abc") == 3


def test_a_daemon_that_says_when_it_will_be_ready_is_asked_then(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    loading = peer.refuse(CODE.UNAVAILABLE, "loading the model", pushback="600000", details=[peer.retry_info(600)])
    error = error_of(daemon, connect, loading)
    assert isinstance(error, hearth.UnavailableError)
    # Later than it was ready to wait, so not at all.
    assert (error.retry_after, error.is_transient, len(daemon.requests)) == (600, True, 1)


def test_what_waiting_does_not_help_is_not_waited_for(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    failed = peer.refuse(CODE.UNAVAILABLE, "other cannot be loaded now", pushback="-1")
    error = error_of(daemon, connect, failed, ready_timeout=3600, timeout=3600)
    assert isinstance(error, hearth.UnavailableError)
    assert (str(error), error.is_transient, len(daemon.requests)) == ("other cannot be loaded now", False, 1)


def test_a_question_about_now_is_not_waited_for(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    daemon.small_call = lambda context: context.abort(CODE.UNAVAILABLE, "loading")
    with connect(daemon.address) as client, pytest.raises(hearth.UnavailableError, match="loading"):
        client.status()
    assert len(daemon.metadata) == 1


def test_the_deadline_of_an_answer(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    def script(_: Any, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
        yield peer.delta("half")
        peer.wait_for_end(context)

    daemon.script = script
    with connect(daemon.address) as client:
        stream = client.stream("?", timeout=0.3)
        with pytest.raises(hearth.DeadlineError, match="timeout"):
            stream.read()
        assert stream.text == "half"
        assert daemon.chat_ended.wait(10)
        for wrong in (0, -1, float("nan")):
            with pytest.raises(hearth.ConfigurationError, match="timeout is"):
                client.chat("?", timeout=wrong)


def test_every_call_has_a_deadline_unless_it_is_waived(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    seen: list[float | None] = []

    def script(_: Any, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
        seen.append(context.time_remaining())
        yield peer.final()

    daemon.script = script
    daemon.small_call = lambda context: seen.append(context.time_remaining())
    with connect(daemon.address) as client:
        client.chat("?")
        client.models()
        client.chat("?", timeout=float("inf"))
    chat, small, waived = seen
    assert chat is not None
    # gRPC rounds up what it writes into the request.
    assert 590 < chat < 610
    assert small is not None
    assert 5 < small < 11
    # What the server sees when the request states none.
    assert waived is None or waived > 1e12


def test_leaving_early_cancels_the_call(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    def script(_: Any, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
        yield peer.delta("half")
        peer.wait_for_end(context)

    daemon.script = script
    with connect(daemon.address) as client:
        with client.stream("?") as stream:
            assert next(stream).text == "half"
        assert daemon.chat_ended.wait(5)
        assert list(stream) == []
        assert stream.text == "half"
        with pytest.raises(hearth.CallCancelledError, match="closed before its end"):
            stream.read()


def test_a_callback_that_raises_ends_the_call(daemon: peer.ScriptedDaemon, connect: Connect) -> None:
    def script(_: Any, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
        yield peer.queued(1)
        peer.wait_for_end(context)

    daemon.script = script

    def give_up(place: hearth.Queued) -> None:
        raise LookupError("too many")

    with connect(daemon.address) as client:
        stream = client.stream("?", on_queued=give_up)
        with pytest.raises(LookupError, match="too many"):
            next(stream)
        assert daemon.chat_ended.wait(5)


class Failure:
    """A failed call, as far as `translate` looks."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: list[tuple[str, str | bytes]]) -> None:
        self._all = code, details, trailers

    def code(self) -> grpc.StatusCode:
        return self._all[0]

    def details(self) -> str:
        return self._all[1]

    def trailing_metadata(self) -> list[tuple[str, str | bytes]]:
        return self._all[2]


@given(
    code=st.sampled_from([code for code in CODE if code is not CODE.OK]),
    details=st.text(),
    packed=st.binary(),
    pushback=st.one_of(st.text(), st.integers().map(str)),
)
def test_whatever_arrives_becomes_one_error_of_one_line(
    code: grpc.StatusCode, details: str, packed: bytes, pushback: str
) -> None:
    trailers: list[tuple[str, str | bytes]] = [
        ("grpc-status-details-bin", packed),
        ("grpc-retry-pushback-ms", pushback),
    ]
    error = translate(Failure(code, details, trailers), "here:1")
    assert isinstance(error, hearth.HearthError)
    assert str(error)
    assert len(str(error).splitlines()) == 1
    assert getattr(error, "retry_after", None) is None or error.retry_after >= 0  # type: ignore[attr-defined]


def test_closing_a_client_ends_its_calls(daemon: peer.ScriptedDaemon) -> None:
    begun = threading.Event()

    def script(_: Any, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
        begun.set()
        peer.wait_for_end(context)
        yield peer.final()

    daemon.script = script
    client = hearth.Client(daemon.address)
    closer = threading.Thread(target=lambda: (begun.wait(10), client.close()))
    closer.start()
    with pytest.raises(hearth.CallCancelledError):
        client.chat("?")
    closer.join()
    with pytest.raises(hearth.CallCancelledError, match="the client is closed"):
        client.models()
    with pytest.raises(hearth.CallCancelledError, match="the client is closed"):
        client.chat("?")


def test_closing_a_client_in_mid_stream_is_no_fault_of_the_daemon(daemon: peer.ScriptedDaemon) -> None:
    """gRPC then says "Stream removed", which from a daemon would mean that it gave the call up."""

    def script(_: Any, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
        while context.is_active():
            yield peer.delta("more ")

    daemon.script = script
    for _ in range(20):
        client = hearth.Client(daemon.address)
        stream = client.stream("?")
        next(stream)
        closer = threading.Thread(target=client.close)
        closer.start()
        with pytest.raises(hearth.CallCancelledError):
            stream.read()
        closer.join()


def test_closing_ends_the_wait_for_another_attempt(daemon: peer.ScriptedDaemon) -> None:
    daemon.script = peer.refuse(CODE.RESOURCE_EXHAUSTED, "full", pushback="600000")
    client = hearth.Client(daemon.address, timeout=3600)
    stream = client.stream("?")
    closer = threading.Thread(target=lambda: (daemon.chat_ended.wait(10), stream.close()))
    closer.start()
    with pytest.raises(hearth.CallCancelledError):
        stream.read()
    closer.join()
    client.close()


def test_dropping_a_stream_cancels_its_call(daemon: peer.ScriptedDaemon) -> None:
    def script(_: Any, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatResponse]:
        yield peer.delta("half")
        peer.wait_for_end(context)

    daemon.script = script
    with hearth.Client(daemon.address) as client:
        for delta in client.stream("?"):
            assert delta.text == "half"
            break
        assert daemon.chat_ended.wait(5)
