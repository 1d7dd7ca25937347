"""Metrics and status of a whole daemon: what callers do is counted, and nothing that they say is told."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hearth.v1 import status_pb2, status_pb2_grpc
from hearthd.errors import AddressInUseError
from hearthd.server import Server
from serving import (
    NAME,
    PROOF_FORWARDS,
    answer,
    asynchronous,
    chat_request,
    make_config,
    make_model,
    make_runner,
    serving,
    start_chat,
    unix_target,
)

CANARY = "zanzibar-7f3a"
ROOT = Path(__file__).resolve().parent.parent


def config_of(directory: Path, **sections: Any) -> Any:
    return make_config(directory, metrics={"address": "127.0.0.1:0"}, **sections)


async def fetch(server: Server) -> str:
    """Return the page, collected anew."""
    (address,) = server.metrics_addresses
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
    answered = (await reader.read()).decode()
    writer.close()
    head, _, body = answered.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n")
    return body


def figures(page: str) -> dict[str, float]:
    """Every sample as Prometheus shows it, `name{label="value"}`."""
    found = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


@pytest.fixture(autouse=True)
def always_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hearthd.watching.metrics.endpoint._KEEP_SECONDS", 0.0)


async def status(channel: grpc.aio.Channel) -> status_pb2.GetStatusResponse:
    return await status_pb2_grpc.StatusServiceStub(channel).GetStatus(status_pb2.GetStatusRequest())


@asynchronous
async def test_who_gives_way_in_a_full_queue_is_refused_and_nothing_has_failed(tmp_path: Path) -> None:
    config = config_of(tmp_path, engine={"slots": 1}, limits={"max_queued": 2}, auth={"open_role": "admin"})
    runner = make_runner(num_slots=1, is_gated=True)
    runner.allow(PROOF_FORWARDS)
    async with (
        serving(config, lambda _: make_model(runner)) as server,
        grpc.aio.insecure_channel(unix_target(config)) as channel,
    ):
        calls = [asyncio.ensure_future(answer(channel, chat_request(f"hello {n}", max_tokens=3))) for n in range(3)]
        while (told := await status(channel)).running_count + told.queued_count < 3:
            pass
        (worker,) = server._parts.models.workers
        with worker.admit(account="newcomer"):
            pass
        runner.open_gate()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        refused = [error for error in answers if isinstance(error, grpc.aio.AioRpcError)]
        assert [error.code() for error in refused] == [grpc.StatusCode.RESOURCE_EXHAUSTED]
        found, told = figures(await fetch(server)), await status(channel)
    assert found['hearth_refused_calls_total{reason="queue_full"}'] == 1
    assert {key: count for key, count in found.items() if key.startswith("hearth_chats_total") and count} == {
        f'hearth_chats_total{{model="{NAME}",outcome="length",role="admin"}}': 2
    }
    assert (told.chats_refused_count, told.chats_failed_count) == (1, 0)


@asynchronous
async def test_what_callers_do_is_counted(tmp_path: Path) -> None:
    config = config_of(tmp_path, auth={"open_role": "admin"})
    async with serving(config) as server, grpc.aio.insecure_channel(unix_target(config)) as channel:
        before = figures(await fetch(server))
        _, first = await answer(channel, chat_request("hello", max_tokens=5))
        _, second = await answer(channel, chat_request("hello again", max_tokens=1))
        with contextlib.suppress(grpc.aio.AioRpcError):
            await answer(channel, chat_request("hello", temperature=99))
        with contextlib.suppress(grpc.aio.AioRpcError):
            await answer(channel, chat_request("hello", model="nope"))
        found = figures(await fetch(server))
        told = await status(channel)
    who = f'model="{NAME}"'
    assert before['hearth_refused_calls_total{reason="invalid"}'] == 0
    assert found['hearth_refused_calls_total{reason="invalid"}'] == 1
    assert found['hearth_refused_calls_total{reason="not_found"}'] == 1
    assert dict(told.refused_calls_count) == {"invalid": 1, "not_found": 1}
    assert found[f'hearth_chats_total{{{who},outcome="length",role="admin"}}'] == 2
    assert found[f'hearth_time_to_first_token_seconds_count{{{who},priority="normal"}}'] == 2
    assert found[f'hearth_inter_token_seconds_count{{{who},priority="normal"}}'] == 1
    assert found["hearth_completion_tokens_total"] == 6 == told.completion_tokens_count
    prompts = first.usage.prompt_tokens + second.usage.prompt_tokens
    assert found["hearth_prompt_tokens_total"] == prompts == told.prompt_tokens_count
    assert found['hearth_cached_prompt_tokens_total{source="memory"}'] == second.usage.cached_prompt_tokens
    assert found['hearth_state{state="serving"}'] == 1
    assert found[f"hearth_model_loaded{{{who}}}"] == found[f"hearth_model_loads_total{{{who}}}"] == 1
    assert found["process_resident_memory_bytes"] > 1e6
    assert told.recent.answer_count == 2
    assert told.recent.worst_time_to_first_token_ms >= told.recent.median_time_to_first_token_ms > 0
    assert [(model.name, model.is_loaded, model.load_count) for model in told.models] == [(NAME, True, 1)]


@asynchronous
async def test_running_and_waiting_chats_and_their_tokens_are_seen_while_they_are(tmp_path: Path) -> None:
    config = config_of(tmp_path, engine={"slots": 1})
    runner = make_runner(num_slots=1, is_gated=True)
    runner.allow(PROOF_FORWARDS)
    async with (
        serving(config, lambda _: make_model(runner)) as server,
        grpc.aio.insecure_channel(unix_target(config)) as channel,
    ):
        running = start_chat(channel, chat_request("hello", max_tokens=100))
        await asyncio.to_thread(runner.wait_for_forwards, PROOF_FORWARDS + 1)
        waiting = start_chat(channel, chat_request("hello", max_tokens=100))
        told_to_wait = asyncio.ensure_future(waiting.read())
        # Whoever comes is told at the next step.
        while not (await asyncio.wait((told_to_wait,), timeout=0.05))[0]:
            runner.allow(1)
        assert told_to_wait.result().WhichOneof("event") == "queued"
        num_forwards = runner.num_forwards
        runner.allow(4)
        await asyncio.to_thread(runner.wait_for_forwards, num_forwards + 4)
        found, told = figures(await fetch(server)), await status(channel)
        assert found['hearth_running_chats{priority="normal"}'] == told.normal.running_count == 1
        assert found['hearth_queued_chats{priority="normal"}'] == told.normal.queued_count == 1
        # Those of an answer that has not ended.
        assert found["hearth_completion_tokens_total"] == told.completion_tokens_count > 2
        assert told.prompt_tokens_count > 0
        running.cancel()
        waiting.cancel()
        runner.open_gate()


@asynchronous
async def test_nothing_that_anybody_says_is_in_the_metrics(tmp_path: Path) -> None:
    config = config_of(tmp_path, auth={"open_role": "admin"})
    metadata = (("x-secret", CANARY), ("authorization", f"Bearer {CANARY}"))
    async with serving(config) as server, grpc.aio.insecure_channel(unix_target(config)) as channel:
        said = chat_request(f"I am {CANARY}", stop=[CANARY], max_tokens=4, request_id=CANARY)
        await answer(channel, said, metadata=metadata)
        for wrong in (
            chat_request(CANARY, temperature=99),
            chat_request("a", model=CANARY),
            chat_request("a", request_id=f"{CANARY} é"),
        ):
            with pytest.raises(grpc.aio.AioRpcError):
                await answer(channel, wrong, metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary(f"/{CANARY}/M")(b"", metadata=metadata)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hearthd.services.chat.read_chat", _leak)
            with pytest.raises(grpc.aio.AioRpcError):
                await answer(channel, said, metadata=metadata)
        page, told = await fetch(server), await status(channel)
    assert figures(page)["hearth_incidents_total"] == 1
    assert CANARY not in page
    assert CANARY not in str(told)


def _leak(*_: object) -> Any:
    raise RuntimeError(CANARY)


@asynchronous
async def test_without_an_address_there_is_no_page(tmp_path: Path) -> None:
    async with serving(make_config(tmp_path)) as server:
        assert server.metrics_addresses == []


@asynchronous
async def test_the_page_answers_while_the_model_loads(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    runner = make_runner(is_gated=True)
    server = Server(config, lambda _: make_model(runner))
    running = asyncio.create_task(server.run())
    await asyncio.to_thread(runner.wait_for_forwards, 1)
    assert figures(await fetch(server))['hearth_state{state="loading"}'] == 1
    server.stop()
    await running


@asynchronous
async def test_an_address_in_use_ends_the_daemon_with_one_line(tmp_path: Path) -> None:
    async with serving(config_of(tmp_path)) as server:
        directory = tmp_path / "other"
        directory.mkdir()
        config = make_config(directory, metrics={"address": server.metrics_addresses[0]})
        with pytest.raises(AddressInUseError, match=r"metrics\.address has 127"):
            async with serving(config):
                pass


def test_who_asks_for_no_metrics_does_not_pay_for_them() -> None:
    program = "import sys, hearthd.server; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT).returncode == 0
