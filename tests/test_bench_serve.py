"""The load generator: who asks when, the arithmetic, what counts as refused, and that its tables come of its data."""

import asyncio
import importlib
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from hearth.v1 import chat_pb2
from serving import asynchronous, make_config, make_model, make_runner, serving, tcp_target

ROOT = Path(__file__).resolve().parent.parent
LOADED_DAEMON = Path(__file__).resolve().parent / "loaded_daemon.py"
MODULES = (
    "arrivals", "bench", "chat", "measures", "open_loop", "openai_http", "outcome", "plot", "report", "scenarios",
    "scenarios.cancels", "scenarios.flood", "scenarios.house", "scenarios.memory", "scenarios.mixes",
    "scenarios.prefix", "scenarios.stall", "server_process", "summary", "targets",
)  # fmt: skip


@pytest.fixture(scope="module")
def load() -> Iterator[Any]:
    """The package benchmarks/load, whose modules find those of benchmarks/peers by directory."""
    directories = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks/peers")]
    sys.path[:0] = directories
    try:
        package = importlib.import_module("load")
        for name in MODULES:
            importlib.import_module(f"load.{name}")
        yield package
    finally:
        for directory in directories:
            sys.path.remove(directory)


# Arrivals.


def test_a_seed_names_the_arrivals(load: Any) -> None:
    callers, kinds = ("ann", "bob"), load.arrivals.HOUSE[:2]
    drawn = load.arrivals.open_loop(callers, kinds, rate=2.0, seconds=4.0, seed=7)
    assert drawn == load.arrivals.open_loop(callers, kinds, rate=2.0, seconds=4.0, seed=7)
    assert drawn != load.arrivals.open_loop(callers, kinds, rate=2.0, seconds=4.0, seed=8)
    # Nobody changes them unnoticed: figures of two days would be of different arrivals.
    assert [(each.number, round(each.at, 4), each.caller, each.kind.prompt_words) for each in drawn[:3]] == [
        (0, 0.2276, "bob", 24),
        (1, 0.2575, "ann", 24),
        (2, 0.6115, "ann", 12),
    ]


def test_arrivals_come_at_their_rate_with_gaps_of_a_poisson_process(load: Any) -> None:
    drawn = load.arrivals.open_loop(("ann",), load.arrivals.HOUSE, rate=5.0, seconds=2000.0, seed=1)
    times = [each.at for each in drawn]
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    assert len(drawn) == pytest.approx(10_000, abs=6)
    assert mean == pytest.approx(0.2, rel=0.05)
    # Of an exponential distribution: the spread equals the mean, and e^-1 of all gaps are longer than it.
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(0.2, rel=0.05)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.02)


def test_every_caller_wants_the_same(load: Any) -> None:
    drawn = load.arrivals.open_loop(("ann", "bob", "eve"), load.arrivals.HOUSE, rate=1.0, seconds=60.0, seed=3)
    wanted = {
        name: sorted(each.kind.answer_tokens for each in drawn if each.caller == name) for name in ("ann", "bob", "eve")
    }
    assert wanted["ann"] == wanted["bob"] == wanted["eve"]
    assert len(wanted["ann"]) == 3 * len(load.arrivals.HOUSE)


def test_a_late_answer_delays_no_later_request_and_counts_from_when_it_was_due(load: Any) -> None:
    kind = load.arrivals.HOUSE[0]
    arrivals = [load.arrivals.Arrival(number, 0.0, "ann", kind) for number in range(3)]

    async def measure() -> list[Any]:
        all_began, begun = asyncio.Event(), []

        async def ask(arrival: Any, due: float) -> Any:
            begun.append(arrival.number)
            if len(begun) == len(arrivals):
                all_began.set()
            # None of them ends before the last one has begun.
            await all_began.wait()
            return load.outcome.Outcome("ann", due, deltas=[due + 2.5])

        async with asyncio.timeout(10):
            return await load.open_loop.offer(arrivals, ask)

    outcomes = asyncio.run(measure())
    assert [round(each.first_token_seconds, 6) for each in outcomes] == [2.5] * 3


# Arithmetic.


def test_a_percentile_is_a_measured_value_by_nearest_rank(load: Any) -> None:
    values = [15.0, 20.0, 35.0, 40.0, 50.0]
    found = [load.measures.percentile(values, percent) for percent in (5, 30, 40, 50, 95, 100)]
    assert found == [15.0, 20.0, 20.0, 35.0, 50.0, 50.0]
    assert load.measures.percentile(list(range(1, 101)), 99) == 99
    assert load.measures.percentiles([3.0, 1.0, 2.0]) == {"p50": 2.0, "p95": 3.0, "p99": 3.0, "max": 3.0}
    assert load.measures.percentiles([]) is None
    with pytest.raises(ValueError, match="no values"):
        load.measures.percentile([], 50)


def test_fairness_is_one_for_equal_shares_and_one_nth_for_one_who_has_all(load: Any) -> None:
    assert load.measures.jain_index([7, 7, 7]) == pytest.approx(1.0)
    assert load.measures.jain_index([9, 0, 0]) == pytest.approx(1 / 3)
    assert load.measures.jain_index([1, 3]) == pytest.approx(16 / 20)
    assert load.measures.jain_index([0, 0]) == 1.0
    assert load.measures.worst_wait_ratio({"ann": [1.0, 3.0], "bob": [6.0], "eve": []}) == pytest.approx(1.5)
    assert load.measures.worst_wait_ratio({"eve": []}) is None


def test_growth_compares_the_last_tenth_with_the_second(load: Any) -> None:
    # The first tenth, when buffers are filled for the first time, does not count.
    samples = [10.0] * 10 + [100.0] * 80 + [103.0] * 10
    assert load.measures.growth_percent(samples) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="9 samples"):
        load.measures.growth_percent([1.0] * 9)


def outcome(load: Any, caller: str = "ann", end: str = "answered", *, at: float = 0.0, **fields: Any) -> Any:
    made = load.outcome.Outcome(caller, at, sent=at, end=load.outcome.End(end), reason="")
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_refusals_are_counted_by_reason_and_stand_in_no_time(load: Any) -> None:
    summary = load.summary.summarise(
        [
            outcome(load, deltas=[0.5, 0.6, 0.8], ended=1.0, completion_tokens=3, prompt_tokens=40, cached_tokens=10),
            outcome(load, "bob", deltas=[2.0], ended=4.0, completion_tokens=1, priority="background"),
            outcome(load, "bob", "refused", reason="queue full", ended=0.01),
            outcome(load, "bob", "refused", reason="queue full", ended=0.02),
            outcome(load, "bob", "failed", reason="deadline", deltas=[9.0], ended=4.0),
        ]
    )
    assert (summary["requests"], summary["answered"]) == (5, 2)
    assert summary["refused"] == {"queue full": 2}
    assert summary["failed"] == {"deadline": 1}
    assert summary["first_token_ms"]["max"] == 2000.0
    assert [round(value) for value in summary["inter_token_ms"].values()] == [100, 200, 200, 200]
    assert summary["tokens_per_second"] == 1.0
    assert summary["cached_share_of_prompts"] == 0.25
    assert summary["by_priority"]["background"]["first_token_ms"]["p50"] == 2000.0
    assert summary["fairness"]["jain_index"] == pytest.approx(16 / 20)
    assert summary["fairness"]["worst_wait_ratio"] == pytest.approx(2.0 / 1.25)


def test_the_generators_own_delay_is_told(load: Any) -> None:
    summary = load.summary.summarise([outcome(load, at=1.0, sent=1.2, deltas=[2.0], ended=3.0)])
    assert summary["generator_late_ms"] == pytest.approx(200)
    assert summary["first_token_ms"]["p50"] == pytest.approx(1000)


# Targets.


def test_a_target_is_met_up_to_its_limit(load: Any) -> None:
    targets = load.targets
    assert [targets.at_most("x", value, 50, "ms").verdict.value for value in (50.0, 50.1)] == ["met", "NOT MET"]
    assert [targets.at_least("x", value, 95, "%").verdict.value for value in (95.0, 94.9)] == ["met", "NOT MET"]
    assert targets.at_most("x", float("inf"), 200, "ms").verdict.value == "NOT MET"


def test_a_prompt_that_came_from_no_cache_is_no_figure_of_a_cache(load: Any) -> None:
    def asked(seconds: float, cached: int) -> Any:
        return outcome(load, deltas=[seconds], prompt_tokens=1000, cached_tokens=cached)

    cold = [asked(1.0, 0), asked(2.0, 0)]
    result = load.scenarios.prefix.result(cold, [asked(0.03, 990), asked(0.08, 990)], [asked(0.9, 5), asked(1.9, 5)])
    cached, restarted = result.targets
    # The median of the ratios of each prompt, 3 and 4 %.
    assert (cached.measured, cached.verdict.value) == (pytest.approx(3.5), "met")
    assert (restarted.measured, restarted.verdict.value) == (None, "not available")
    assert restarted.note == "5 tokens came from a cache"
    slow = load.scenarios.prefix.result(cold, [asked(0.05, 990)] * 2, [asked(0.1, 990)] * 2).targets
    assert [target.verdict.value for target in slow] == ["met", "met"]
    slow = load.scenarios.prefix.result(cold, [asked(0.2, 990)] * 2, [asked(0.9, 990)] * 2).targets
    assert [target.verdict.value for target in slow] == ["NOT MET", "NOT MET"]


def test_only_gaps_beside_the_long_prompt_count(load: Any) -> None:
    answer = outcome(load, deltas=[1.0, 2.0, 2.5, 4.0, 9.0])
    assert load.scenarios.stall.gaps_during(answer, 2.2, 4.5) == [0.5, 1.5]


def flood_result(load: Any, *, visits: dict[str, list[Any]], overtaken: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    result = load.scenarios.flood.result(visits, 1, [0.01, 0.02], list(overtaken), 5.0)
    return {target.name.split(",")[0]: target for target in result.targets}


def test_a_flood_is_judged_by_refusals_delays_health_and_who_got_nothing(load: Any) -> None:
    refused = outcome(load, end="refused", ended=0.04, retry_after=1.0)
    served = outcome(load, deltas=[3.0], ended=4.0)
    found = flood_result(load, visits={"ann": [refused, served], "bob": [served]})
    assert {target.verdict.value for target in found.values()} == {"met"}
    assert found["refusal"].measured == pytest.approx(40)
    assert found["health during the flood"].measured == pytest.approx(20)

    late = outcome(load, end="refused", ended=0.06)
    found = flood_result(load, visits={"ann": [late, served], "bob": [late, late]}, overtaken=(0, 7))
    assert {target.verdict.value for target in found.values()} == {"NOT MET", "met"}
    assert [name for name, target in found.items() if target.verdict.value == "met"] == ["health during the flood"]
    assert found["refusals that say when to come again"].measured == 0
    assert found["patient callers who got all answers"].measured == 1

    # Nobody was refused: the limits are not what they are said to be.
    assert flood_result(load, visits={"ann": [served]})["refusal"].verdict.value == "NOT MET"


def test_an_answer_that_differs_in_one_token_is_found(load: Any) -> None:
    alone = outcome(load, text="abcd", tokens=[(1, -0.5), (2, -0.25), (3, -0.125)])
    tally = load.scenarios.mixes.Tally()
    tally.compare("same", alone, outcome(load, text="abcd", tokens=list(alone.tokens), cached_tokens=8))
    tally.compare("begun", alone, outcome(load, end="cancelled", text="ab", tokens=alone.tokens[:2]))
    assert (tally.whole, tally.cancelled, tally.from_cache) == (1, 1, 1)
    assert (tally.different, tally.other_bits, tally.lost) == ([], 0, [])
    tally.compare("other", alone, outcome(load, text="abXd", tokens=[(1, -0.5), (7, -0.25), (3, -0.125)]))
    tally.compare("short", alone, outcome(load, text="ab", tokens=alone.tokens[:2]))
    tally.compare("turned", alone, outcome(load, end="cancelled", text="x", tokens=[(9, -0.5)]))
    assert tally.different == ["other at token 1", "short at token 2", "turned at token 0"]
    tally.compare("bits", alone, outcome(load, text="abcd", tokens=[(1, -0.5), (2, -0.25), (3, -0.12500001)]))
    tally.compare("gone", alone, outcome(load, end="refused", reason="queue full"))
    assert (tally.other_bits, tally.lost) == (1, ["queue full"])


# The report.


def whole_report(load: Any, **changes: Any) -> dict[str, Any]:
    answers = [
        outcome(load, deltas=[0.5, 0.6], ended=1.0, completion_tokens=2, priority="interactive"),
        outcome(load, "bob", "refused", reason="queue full", ended=0.01),
    ]
    figures = load.summary.summarise(answers) | {"resident_mb": 300.0, "curves": load.scenarios.house.curves(answers)}
    peer = figures | {"refused": {}, "failed": {"cut short": 7}}
    target = {
        "name": "refusal",
        "wanted": "<= 50 ms",
        "measured": 51.0,
        "unit": "ms",
        "verdict": "NOT MET",
        "note": "n",
    }
    missing = {
        "name": "again",
        "wanted": "<= 1/8",
        "measured": None,
        "unit": "",
        "verdict": "not available",
        "note": "",
    }
    report = {
        "machine": {"processor": "Abacus & Sons", "cores": 2, "flags": ["beads"], "load_average": 0.25},
        "date": "2026-11-22",
        "seconds": 700,
        "settings": {"model": "tiny", "threads": 2, "slots": 4, "seed": 1, "scale": 1.0},
        "scenarios": {
            "house": {"targets": [], "error": "", "figures": {"1/s": figures}},
            "peer": {"targets": [], "error": "", "figures": {"1/s": figures, "1/s, interrupting": peer}},
            "flood": {"targets": [target, missing], "error": "", "figures": {}},
            "mixes": {"targets": [], "error": "hearthd ended with 1", "figures": {}},
        },
        "left_out": ["memory"],
    }
    return report | changes


def test_the_tables_rows_come_of_the_data(load: Any) -> None:
    text = load.report.markdown(whole_report(load))
    assert text.startswith(
        "Run on 2026-11-22: tiny on Abacus & Sons (beads), 2 cores, 2 threads, 4 slots, seed 1; load"
    )
    assert "| refusal | <= 50 ms | 51 ms | NOT MET | n |" in text
    assert "| again | <= 1/8 | - | not available |  |" in text
    assert "|  | Hearth, 1/s | llama-cpp-python, 1/s | llama-cpp-python, 1/s, interrupting |" in text
    assert "| refused | 1 queue full | 1 queue full | 0 |" in text
    assert "| failed | 0 | 0 | 7 cut short |" in text
    assert "| time to first token, p50 / p95 / p99, ms | 500 / 500 / 500 |" in text
    assert "- mixes: hearthd ended with 1\n- memory: left out; `--only memory` runs it\n" in text
    assert "Not the whole run" not in text
    settings = {"model": "tiny", "threads": 2, "slots": 4, "seed": 1, "scale": 0.1}
    assert "**Not the whole run**: --scale 0.1" in load.report.markdown(whole_report(load, settings=settings))
    json.dumps(whole_report(load))


def test_a_peer_that_was_measured_alone_has_a_table_too(load: Any) -> None:
    report = whole_report(load)
    del report["scenarios"]["house"]
    assert "|  | llama-cpp-python, 1/s | llama-cpp-python, 1/s, interrupting |" in load.report.markdown(report)
    assert "llama-cpp-python" in load.plot.draw(report)
    del report["scenarios"]["peer"]
    assert "requests" not in load.report.markdown(report)


def test_an_answer_without_text_has_its_first_token_at_its_end(load: Any) -> None:
    assert outcome(load, at=1.0, ended=1.5).first_token_seconds == 0.5
    assert outcome(load, end="failed", at=1.0, ended=1.5).first_token_seconds is None


def test_the_plot_has_a_curve_for_each_server_that_was_measured(load: Any) -> None:
    space = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(load.plot.draw(whole_report(load)))
    curves = [line.get("points", "").split() for line in root.iter(f"{space}polyline")]
    # Two panels with three curves each. Half of the requests got no answer, so no first token.
    assert [len(points) for points in curves] == [50] * 3 + [100] * 3
    drawn = {text.text for text in root.iter(f"{space}text")}
    assert {"Hearth", "llama-cpp-python's server", "llama-cpp-python's server, interrupting"} <= drawn
    without = whole_report(load)
    without["scenarios"] = {}
    assert list(ElementTree.fromstring(load.plot.draw(without)).iter(f"{space}polyline")) == []


# A caller, over gRPC.


def test_a_request_is_greedy_and_as_urgent_as_was_asked(load: Any) -> None:
    asked = load.chat.request("now", system="be brief", priority="background", turns=[("then", "so")], max_tokens=7)
    assert [message.content for message in asked.messages] == ["be brief", "then", "so", "now"]
    assert (asked.sampling.temperature, asked.sampling.max_tokens) == (0.0, 7)
    assert asked.priority == chat_pb2.PRIORITY_BACKGROUND
    assert load.chat.request("now", max_tokens=7).priority == chat_pb2.PRIORITY_UNSPECIFIED
    assert not asked.sampling.HasField("top_logprobs")
    assert load.chat.request("now", max_tokens=7, with_tokens=True).sampling.HasField("top_logprobs")


@asynchronous
async def test_a_full_queue_is_a_refusal_with_its_delay_and_a_cancel_is_neither(load: Any, tmp_path: Path) -> None:
    runner = make_runner(is_gated=True)
    # What proves the model may pass.
    runner.allow(3)
    config = make_config(tmp_path, limits={"max_queued": 1})
    async with serving(config, lambda *_: make_model(runner)) as server:
        caller = load.chat.Caller("ann", tcp_target(server))
        asked = load.chat.request("hello", max_tokens=3)
        chats = [caller.start(asked) for _ in range(4)]
        reading = [asyncio.create_task(chat.finish()) for chat in chats]
        done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
        # Two run, one waits, and none of them gets on.
        [refused] = [task.result() for task in done]
        assert (refused.end.value, refused.reason) == ("refused", "queue full")
        assert refused.retry_after >= 1.0
        left = [(chat, task) for chat, task in zip(chats, reading, strict=True) if not task.done()]
        left[0][0].cancel()
        cancelled = await left[0][1]
        assert (cancelled.end.value, cancelled.reason) == ("cancelled", "")
        runner.open_gate()
        answered = [await task for _, task in left[1:]]
        assert [each.end.value for each in answered] == ["answered"] * 2
        assert all(each.completion_tokens <= 3 and each.prompt_tokens > 0 for each in answered)
        await caller.close()


@asynchronous
async def test_a_callers_own_deadline_is_told_apart_from_a_full_queue(load: Any, tmp_path: Path) -> None:
    runner = make_runner(is_gated=True)
    runner.allow(3)
    async with serving(make_config(tmp_path), lambda *_: make_model(runner)) as server:
        caller = load.chat.Caller("ann", tcp_target(server))
        late = await caller.ask(load.chat.request("hello", max_tokens=3), seconds=0.2)
        assert late.reason == "deadline"
        assert late.end.value != "answered"
        runner.open_gate()
        await caller.close()


# The peer's protocol.


@asynccontextmanager
async def scripted_http(*parts: bytes) -> AsyncIterator[int]:
    """Serve one script to everybody who asks; yields the port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        for part in parts:
            writer.write(part)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def piece(text: str = "", finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish_reason}
    return b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode() + b"\r\n\r\n"


async def ask_over_http(load: Any, *parts: bytes, seconds: float = 10.0) -> Any:
    async with scripted_http(*parts) as port:
        return await load.openai_http.ask(port, {}, load.outcome.Outcome("ann", 0.0), seconds=seconds)


@asynchronous
async def test_a_streamed_answer_is_read_wherever_it_is_cut(load: Any) -> None:
    whole = b": ping\r\n\r\n" + piece("Grüße") + piece(" an") + piece("", "stop") + b"data: [DONE]\r\n\r\n"
    # Cut inside of a character, a line and an event.
    for place in range(1, len(whole)):
        answered = await ask_over_http(load, HEAD, chunk(whole[:place]), chunk(whole[place:]), b"0\r\n\r\n")
        assert (answered.end.value, answered.text, answered.completion_tokens) == ("answered", "Grüße an", 2)


@pytest.mark.parametrize(
    ("parts", "end", "reason"),
    [
        ([HEAD, chunk(piece("a") + b"data: [DONE]\r\n\r\n"), b"0\r\n\r\n"], "failed", "cut short"),
        ([HEAD, chunk(piece("a"))], "failed", "connection: IncompleteReadError"),
        ([b"HTTP/1.1 503 Busy\r\n\r\n"], "refused", "HTTP 503"),
        ([b"HTTP/1.1 500 Oops\r\n\r\n"], "failed", "HTTP 500"),
        ([HEAD, chunk(b'data: {"error": "no memory"}\r\n\r\n')], "failed", "error: no memory"),
        ([b"nonsense\r\n\r\n"], "failed", "no HTTP"),
    ],
)
def test_what_is_no_whole_answer_is_counted_with_its_reason(
    load: Any, parts: list[bytes], end: str, reason: str
) -> None:
    asked = asyncio.run(ask_over_http(load, *parts))
    assert (asked.end.value, asked.reason) == (end, reason)


# All of it.


def test_the_peers_server_joins_the_environment_of_its_engine_once(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install = importlib.import_module("install")
    installer = install.Installer(tmp_path, tmp_path / "none.gguf", lambda text: None)
    environment = tmp_path / "environments/llama-cpp"
    commands: list[list[str]] = []

    def record(command: list[Any], environment_variables: Any = None) -> None:
        commands.append([str(part) for part in command])
        environment.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(installer, "_run", record)
    monkeypatch.setattr(installer, "_compiler", dict)
    requirements = install.REQUIREMENTS / "llama-cpp-server.txt"
    assert installer.add("llama-cpp", requirements.stem) == environment / "bin/python"
    assert [command[-1] for command in commands[2:]] == [str(requirements)]
    installer.add("llama-cpp", requirements.stem)
    assert len(commands) == 3
    pins = [line for line in requirements.read_text().splitlines() if not line.startswith("#")]
    assert pins
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line)] == []


def bench(load: Any, tmp_path: Path, scale: float) -> Any:
    return load.bench.Bench(
        model=tmp_path / "models/tiny",
        output=tmp_path,
        say=lambda text: None,
        threads=1,
        slots=2,
        scale=scale,
        command=(sys.executable, str(LOADED_DAEMON)),
        # Its tokens are bytes.
        context_length=16384,
        rates=(50.0, 100.0),
    )


def run_scenario(load: Any, tmp_path: Path, name: str, scale: float) -> tuple[dict[str, Any], Any]:
    """Return a scenario's targets by the begin of their names, and its figures, which JSON can hold."""
    result = asyncio.run(load.scenarios.SCENARIOS[name](bench(load, tmp_path, scale)))
    json.dumps(result.figures)
    return {target.name.split(",")[0]: target for target in result.targets}, result.figures


def test_the_house_is_answered_by_a_real_daemon(load: Any, tmp_path: Path) -> None:
    _, figures = run_scenario(load, tmp_path, "house", 0.01)
    assert list(figures) == ["50/s", "100/s"]
    for each in figures.values():
        # One deck: six callers with six kinds of request.
        assert (each["requests"], each["answered"] + sum(each["refused"].values()), each["failed"]) == (36, 36, {})
        assert each["first_token_ms"]["p99"] >= each["first_token_ms"]["p50"] > 0
        assert set(each["by_priority"]) == {"interactive", "normal", "background"}
        assert each["resident_mb"] > 10


def test_cancels_free_their_places(load: Any, tmp_path: Path) -> None:
    targets, figures = run_scenario(load, tmp_path, "cancels", 0.01)
    assert figures["cancels"] == 10 == sum(figures["moments"].values())
    assert figures["problems"] == {}
    assert targets["slot free after a cancel"].measured == figures["free_ms"]["max"]
    assert targets["chats left in the status after the last cancel"].measured < float("inf")


def test_a_flood_is_refused_and_every_patient_caller_is_served(load: Any, tmp_path: Path) -> None:
    targets, figures = run_scenario(load, tmp_path, "flood", 0.8)
    # Two run and sixteen wait of forty.
    assert figures["refused"] >= 10
    assert figures["failed"] == []
    assert targets["refusals that say when to come again"].verdict.value == "met"
    assert targets["patient callers who got all answers"].measured == 40
    assert len(figures["overtaken"]) == 4


def test_no_mix_changes_an_answer(load: Any, tmp_path: Path) -> None:
    targets, figures = run_scenario(load, tmp_path, "mixes", 0.02)
    assert figures["mixes"] == 10
    assert figures["whole"] + figures["cancelled"] >= 20
    assert (figures["different"], figures["different_log_probabilities"], figures["lost"]) == ([], 0, [])
    assert {target.verdict.value for target in targets.values()} == {"met"}


def test_a_prefix_and_a_stall_are_measured(load: Any, tmp_path: Path) -> None:
    targets, figures = run_scenario(load, tmp_path, "prefix", 0.01)
    assert figures["cold"]["cached_tokens"][0] < 100 < figures["cached"]["cached_tokens"][0]
    assert targets["system prompt of 1"].measured > 0
    targets, figures = run_scenario(load, tmp_path, "stall", 0.01)
    [target] = targets.values()
    assert target.measured > 0
    assert all(each["gaps"] > 0 for each in figures["rounds"])


def test_memory_is_watched_over_many_requests(load: Any, tmp_path: Path) -> None:
    [target], figures = [*run_scenario(load, tmp_path, "memory", 0.001)]
    assert (figures["requests"], len(figures["resident_bytes"])) == (100, 100)
    assert min(figures["resident_bytes"]) > 10**7
    assert target.startswith("growth")


def test_a_daemon_that_cannot_start_says_why_and_leaves_nothing(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = load.bench.Bench(
        model=tmp_path / "none", output=tmp_path, say=lambda text: None, command=(sys.executable, "-c", "exit(4)")
    )
    # A short path: that of a Unix socket has at most 107 bytes.
    with tempfile.TemporaryDirectory() as place:
        monkeypatch.setattr(tempfile, "tempdir", place)
        with pytest.raises(load.server_process.ServerError, match="hearthd ended with 4"):
            asyncio.run(load.scenarios.SCENARIOS["mixes"](broken))
        assert list(Path(place).iterdir()) == []


@pytest.mark.model
def test_make_bench_serve_compares_the_real_daemon_with_its_engine(load: Any, tmp_path: Path) -> None:
    program = serve_program()
    assert program.main(["--only", "throughput", "--scale", "0.01", "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "serving.json").read_text())
    rates = written["scenarios"]["throughput"]["figures"]["tokens_per_second"]
    assert all(rate > 0 for streams in rates.values() for rate in streams.values())
    assert written["machine"]["processor"] in (tmp_path / "serving.md").read_text()
    assert (tmp_path / "serving.svg").read_text().startswith("<svg")
    assert json.loads(json.dumps(program._without_infinity({"a": [1.5, float("inf")]}))) == {"a": [1.5, "never"]}


def serve_program() -> ModuleType:
    specification = importlib.util.spec_from_file_location("serve_load", ROOT / "benchmarks/serve.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
