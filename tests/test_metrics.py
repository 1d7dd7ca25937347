"""Metrics: the page and who may fetch it how, and what the figures say; none of it holds anybody's words."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from hearth.v1 import status_pb2
from hearthd.errors import AddressInUseError
from hearthd.listening.listeners import Listener
from hearthd.logs import log_incident
from hearthd.sequences.events import Finished, FinishReason
from hearthd.watching.metrics.endpoint import MetricsEndpoint
from hearthd.watching.metrics.figures import Figures
from hearthd.watching.metrics.live import LiveFigures
from hearthd.watching.outcomes import CHAT_OUTCOMES, ChatEnd, Refusal, Unfinished
from serving import asynchronous

ROOT = Path(__file__).resolve().parent.parent
ANY_PORT = Listener("127.0.0.1:0", "127.0.0.1:0")


class Watched(MetricsEndpoint):
    """Says when connections have begun and ended."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.num_begun = self.num_ended = 0
        self.changed = asyncio.Condition()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self.changed:
            self.num_begun += 1
            self.changed.notify_all()
        try:
            await super()._serve(reader, writer)
        finally:
            async with self.changed:
                self.num_ended += 1
                self.changed.notify_all()

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        async with self.changed:
            await self.changed.wait_for(condition)


@asynccontextmanager
async def endpoint(render: Any = lambda: (b"page", "text/plain"), **options: Any) -> AsyncIterator[Watched]:
    found = Watched([ANY_PORT], render, **options)
    await found.start()
    try:
        yield found
    finally:
        found.close()


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    """What comes before the other end closes, or resets."""
    received = b""
    with suppress(ConnectionError):
        while piece := await reader.read(65536):
            received += piece
    return received


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def ask(address: str, request: bytes) -> tuple[str, str]:
    """Send a request; return the status line and the body, once the other end has closed."""
    reader, writer = await connect(address)
    writer.write(request)
    answer = (await reader.read()).decode()
    writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    return head.partition("\r\n")[0], body


GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


# The page.


@asynchronous
async def test_the_page_is_one_answer_to_one_request() -> None:
    async with endpoint() as page:
        assert await ask(page.addresses[0], GET) == ("HTTP/1.1 200 OK", "page")
        assert await ask(page.addresses[0], GET.replace(b"/metrics", b"/metrics?x=1")) == ("HTTP/1.1 200 OK", "page")
        assert await ask(page.addresses[0], GET.replace(b"GET", b"HEAD")) == ("HTTP/1.1 200 OK", "")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", "405 Method Not Allowed"),
        (b"\r\n\r\n", "400 Bad Request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "400 Bad Request"),
        (b"\x16\x03\x01\x02\r\n\r\n", "400 Bad Request"),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 20000 + b"\r\n\r\n", "400 Bad Request"),
    ],
)
def test_what_is_no_request_for_it_is_told_so(request_: bytes, status: str) -> None:
    @asynchronous
    async def run() -> None:
        async with endpoint() as page:
            reader, writer = await connect(page.addresses[0])
            writer.write(request_)
            assert (await reader.readline()).decode() == f"HTTP/1.1 {status}\r\n"
            writer.transport.abort()
            assert (await ask(page.addresses[0], GET))[0] == "HTTP/1.1 200 OK"

    run()


@asynchronous
async def test_whoever_says_nothing_or_half_a_request_is_let_go() -> None:
    async with endpoint(patience_seconds=0.2) as page:
        for said in (b"", b"GET /metrics HTT", b"GET /metrics HTTP/1.1\r\nHost: x\r\n"):
            reader, writer = await connect(page.addresses[0])
            writer.write(said)
            assert await rest_of(reader) == b""
            writer.close()


@asynchronous
async def test_whoever_reads_nothing_is_let_go() -> None:
    async with endpoint(lambda: (b"x" * 50_000_000, "text/plain"), patience_seconds=0.2) as page:
        reader, writer = await connect(page.addresses[0])
        writer.write(GET)
        await page.wait_for(lambda: page.num_ended == 1)
        assert len(await rest_of(reader)) < 50_000_000
        writer.close()


@asynchronous
async def test_many_silent_connections_leave_room_again_when_they_go() -> None:
    async with endpoint(patience_seconds=30) as page:
        silent = [await connect(page.addresses[0]) for _ in range(8)]
        await page.wait_for(lambda: page.num_begun == 8)
        reader, writer = await connect(page.addresses[0])
        assert await rest_of(reader) == b""
        writer.close()
        for _, other in silent:
            other.transport.abort()
        await page.wait_for(lambda: page.num_ended == 9)
        assert (await ask(page.addresses[0], GET))[0] == "HTTP/1.1 200 OK"


@asynchronous
async def test_asking_all_the_time_does_not_collect_all_the_time() -> None:
    count = 0

    def render() -> tuple[bytes, str]:
        nonlocal count
        count += 1
        return b"%d" % count, "text/plain"

    async with endpoint(render, keep_seconds=3600.0) as page:
        assert {(await ask(page.addresses[0], GET))[1] for _ in range(5)} == {"1"}
    async with endpoint(render, keep_seconds=0.0) as page:
        assert [(await ask(page.addresses[0], GET))[1] for _ in range(3)] == ["2", "3", "4"]


@asynchronous
async def test_a_fault_is_told_by_an_id(caplog: pytest.LogCaptureFixture) -> None:
    def render() -> tuple[bytes, str]:
        raise ValueError("canary")

    async with endpoint(render) as page:
        status, body = await ask(page.addresses[0], GET)
    assert status == "HTTP/1.1 500 Internal Server Error"
    assert body.startswith("incident ")
    assert "canary" not in body + caplog.text


@asynchronous
async def test_an_address_in_use_is_one_line() -> None:
    async with endpoint() as page:
        other = MetricsEndpoint([Listener(page.addresses[0], page.addresses[0])], lambda: (b"", ""))
        with pytest.raises(AddressInUseError, match=r"metrics\.address has 127\.0\.0\.1:\d+, which cannot be bound"):
            await other.start()


# The figures.


def samples(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = generate_latest(registry).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def ended(why: FinishReason | Unfinished, **changes: Any) -> ChatEnd:
    values = {
        "prompt_tokens": 20,
        "cached_prompt_tokens": 5,
        "completion_tokens": 11,
        "queue_seconds": 0.25,
        "prefill_seconds": 0.5,
        "time_to_first_token_seconds": 0.75,
        "decode_seconds": 1.0,
        "longest_gap_seconds": 0.4,
    }
    finished = Finished(reason=why, **(values | changes)) if isinstance(why, FinishReason) else None
    return ChatEnd(model="m", role="user", why=why, finished=finished)


def test_ends_of_chats_are_counted_by_outcome_and_times_by_model_and_priority() -> None:
    registry = CollectorRegistry()
    figures = Figures(registry)
    for why in (FinishReason.LENGTH, FinishReason.LENGTH, Unfinished.CANCELLED):
        figures.chat_ended(ended(why))
    found = samples(registry)
    who = (("model", "m"), ("role", "user"))
    assert found["hearth_chats_total", (who[0], ("outcome", "length"), who[1])] == 2
    assert found["hearth_chats_total", (who[0], ("outcome", "cancelled"), who[1])] == 1
    labels = (("model", "m"), ("priority", "normal"))
    for name, total in (
        ("hearth_queue_seconds", 0.5),
        ("hearth_time_to_first_token_seconds", 1.5),
        ("hearth_inter_token_seconds", 0.2),
        ("hearth_longest_gap_seconds", 0.8),
    ):
        assert found[f"{name}_count", labels] == 2
        assert found[f"{name}_sum", labels] == pytest.approx(total)
    assert found["hearth_prefill_seconds_sum", (("model", "m"),)] == 1.0


def test_an_answer_without_a_token_has_no_times_of_one() -> None:
    registry = CollectorRegistry()
    figures = Figures(registry)
    figures.chat_ended(ended(FinishReason.TIME_LIMIT, completion_tokens=0))
    figures.chat_ended(ended(FinishReason.LENGTH, completion_tokens=1, decode_seconds=0.0))
    found = samples(registry)
    labels = (("model", "m"), ("priority", "normal"))
    assert found["hearth_queue_seconds_count", labels] == 2
    assert found["hearth_time_to_first_token_seconds_count", labels] == 1
    assert ("hearth_inter_token_seconds_count", labels) not in found


def test_refusals_begin_at_0_and_incidents_are_counted_wherever_they_happen() -> None:
    registry = CollectorRegistry()
    figures = Figures(registry)
    found = samples(registry)
    assert {labels for name, labels in found if name == "hearth_refused_calls_total"} == {
        (("reason", reason.value),) for reason in Refusal
    }
    figures.call_refused(Refusal.QUOTA)
    assert samples(registry)["hearth_refused_calls_total", (("reason", "quota"),)] == 1
    handler = figures.incident_handler()
    logger = logging.getLogger("hearthd.logs")
    logger.addHandler(handler)
    try:
        log_incident("something", ValueError("canary"))
    finally:
        logger.removeHandler(handler)
    assert samples(registry)["hearth_incidents_total", ()] == 1


def test_there_is_a_bounded_number_of_series_whatever_happens() -> None:
    """What a caller chooses freely is no label: model and role are the configuration's, all others are listed here."""
    registry = CollectorRegistry()
    figures = Figures(registry)
    for why in (*FinishReason, *Unfinished):
        figures.chat_ended(ended(why))
    for refusal in Refusal:
        figures.call_refused(refusal)
    registry.register(LiveFigures(status_pb2.GetStatusResponse, lambda: 0))
    words: dict[str, set[str]] = {}
    for _, labels in samples(registry):
        for name, value in labels:
            words.setdefault(name, set()).add(value)
    assert words.keys() == {"le", "model", "role", "outcome", "priority", "reason", "state", "source", "version"}
    assert words["outcome"] == set(CHAT_OUTCOMES)
    assert words["priority"] == {"interactive", "normal", "background"}
    assert words["source"] == {"memory", "disk"}
    assert words["state"] == {"loading", "serving", "draining"}
    assert len(samples(registry)) < 200


def test_live_figures_are_the_status() -> None:
    status = status_pb2.GetStatusResponse(
        state=status_pb2.DAEMON_STATE_SERVING,
        version="1.2.3",
        max_running=4,
        max_queued=16,
        warnings=["one"],
        interactive=status_pb2.ChatCounts(running_count=1),
        background=status_pb2.ChatCounts(queued_count=2, paused_count=3),
        prompt_tokens_count=100,
        cached_prompt_tokens_count=70,
        cached_prompt_tokens_from_disk_count=30,
        completion_tokens_count=50,
        kv_bytes=1000,
        max_kv_bytes=2000,
        models=[status_pb2.ModelStatus(name="m", is_loaded=True, load_count=2)],
        board=status_pb2.BoardStatus(
            temperature_celsius=61.5, has_flags=True, flags=[status_pb2.BOARD_FLAG_THROTTLED], thermal_level=2
        ),
    )
    registry = CollectorRegistry()
    registry.register(LiveFigures(lambda: status, lambda: 7))
    found = samples(registry)
    expected = {
        ("hearth_info", (("version", "1.2.3"),)): 1,
        ("hearth_state", (("state", "serving"),)): 1,
        ("hearth_state", (("state", "loading"),)): 0,
        ("hearth_running_chats", (("priority", "interactive"),)): 1,
        ("hearth_queued_chats", (("priority", "background"),)): 2,
        ("hearth_paused_chats", (("priority", "background"),)): 3,
        ("hearth_max_running_chats", ()): 4,
        ("hearth_max_queued_chats", ()): 16,
        ("hearth_warnings", ()): 1,
        ("hearth_prompt_tokens_total", ()): 100,
        ("hearth_cached_prompt_tokens_total", (("source", "memory"),)): 40,
        ("hearth_cached_prompt_tokens_total", (("source", "disk"),)): 30,
        ("hearth_completion_tokens_total", ()): 50,
        ("hearth_kv_bytes", ()): 1000,
        ("hearth_max_kv_bytes", ()): 2000,
        ("hearth_model_loaded", (("model", "m"),)): 1,
        ("hearth_model_loads_total", (("model", "m"),)): 2,
        ("hearth_audit_lines_lost_total", ()): 7,
        ("hearth_temperature_celsius", ()): 61.5,
        ("hearth_throttled", (("flag", "throttled"),)): 1,
        ("hearth_throttled", (("flag", "under_voltage"),)): 0,
        ("hearth_thermal_level", ()): 2,
    }
    assert {key: found.get(key) for key in expected} == expected


def test_a_machine_without_sensors_has_no_figures_of_them() -> None:
    registry = CollectorRegistry()
    registry.register(LiveFigures(status_pb2.GetStatusResponse, lambda: 0))
    names = {name for name, _ in samples(registry)}
    assert names & {"hearth_temperature_celsius", "hearth_throttled", "hearth_max_kv_bytes"} == set()
    assert "hearth_thermal_level" in names


# The documents.


def known_names() -> set[str]:
    return set(known_types())


def known_types() -> dict[str, str]:
    """Every metric as Prometheus stores it, with its type, and with all that a board can have."""
    registry = CollectorRegistry()
    Figures(registry)
    board = status_pb2.BoardStatus(temperature_celsius=1, has_flags=True)
    full = status_pb2.GetStatusResponse(max_kv_bytes=1, board=board)
    registry.register(LiveFigures(lambda: full, lambda: 0))
    return {
        f"{family.name}_total" if family.type == "counter" else family.name: family.type
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        # The daemon switches these off, for the whole process.
        if not family.name.endswith("_created")
    }


def test_the_document_describes_every_metric_and_no_other() -> None:
    text = (ROOT / "docs/observability.md").read_text(encoding="utf-8")
    described = {
        name for row in text.splitlines() if row.startswith("| `") for name in re.findall(r"`(hearth_\w+)`", row)
    }
    assert described == known_names()


def test_the_document_says_of_which_type_each_metric_is() -> None:
    rows = [row.split(" | ") for row in (ROOT / "docs/observability.md").read_text(encoding="utf-8").splitlines()]
    described = {
        name: row[1] for row in rows if row[0].startswith("| `") for name in re.findall(r"`(hearth_\w+)`", row[0])
    }
    assert described == known_types()


@pytest.mark.parametrize("file", ["docs/observability.md", "deploy/prometheus/alerts.yml"])
def test_queries_and_alerts_are_about_metrics_that_there_are(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    asked = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bhearth_\w+", text)}
    assert asked
    assert asked - known_names() == set()


def test_the_document_lists_every_outcome_and_reason() -> None:
    text = (ROOT / "docs/observability.md").read_text(encoding="utf-8")
    for word in (*CHAT_OUTCOMES, *(reason.value for reason in Refusal)):
        assert f"`{word}`" in text, word
