"""`hearthd bench` measures what it says, takes turns, keeps to its budget, and prints one object."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from decoders import tiny_bundle, tiny_checkpoint
from hearthd.__main__ import main
from hearthd.bench import measure
from hearthd.bench.bandwidth import MIN_BUFFER_BYTES, ReadBandwidth, make_buffer
from hearthd.bench.fresh import FreshProcess
from hearthd.bench.runs import MAX_STEPS, MIN_STEPS, FittedRuns
from hearthd.bench.suite import check_room
from hearthd.bench.traffic import StepTraffic
from hearthd.bench.turns import Figure, Measurement, NotMeasurableError, take_turns
from hearthd.board.machine import Machine
from hearthd.bundles.bundle import Bundle
from hearthd.errors import BenchError, BundleError

CONTEXT = 192


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeRunner:
    """Notes every run; each takes a number of the clock's seconds for each token."""

    num_slots, context_length, vocab_size, min_run = 4, 256, 16, 2
    preset_tokens = ()

    def __init__(self, clock: Clock, seconds: float = 1.0) -> None:
        self._clock = clock
        self._seconds = seconds
        self.runs: list[tuple[tuple[int, ...], int, list[int]]] = []
        self.copies: list[tuple[int, int, int]] = []

    def forward(
        self, token_ids: NDArray[np.int64], first_slot: int, past_lengths: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        self.runs.append((token_ids.shape, first_slot, past_lengths.tolist()))
        self._clock.now += self._seconds * token_ids.size
        return np.zeros((token_ids.shape[0], self.vocab_size), np.float32)

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        self.copies.append((source, target, num_tokens))

    def rest(self) -> None: ...

    def load_preset(self, slot: int) -> None: ...

    def swap_slots(self, a: int, b: int, num_a: int, num_b: int) -> None: ...

    def terminate(self) -> None: ...


# The measurements of one runner


@pytest.mark.parametrize(
    ("num_tokens", "cut"),
    [(5, [(0, 5)]), (4, [(0, 4)]), (9, [(0, 4), (4, 9)]), (10, [(0, 4), (4, 8), (8, 10)]), (1, [(0, 1)])],
)
def test_a_prompt_is_cut_as_the_engine_cuts_it(num_tokens: int, cut: list[tuple[int, int]]) -> None:
    assert list(measure.chunks(num_tokens, 4, 2)) == cut


def test_prefill_times_the_runs_of_all_chunks() -> None:
    clock = Clock()
    runner = FakeRunner(clock, seconds=0.5)
    assert measure.prefill(runner, 10, chunk=4, slot=1, clock=clock) == 5.0
    assert runner.runs == [((1, 4), 1, [0]), ((1, 4), 1, [4]), ((1, 2), 1, [8])]


def test_decode_times_steps_of_all_streams_each_one_position_further() -> None:
    clock = Clock()
    runner = FakeRunner(clock)
    assert measure.decode(runner, 3, 7, num_steps=2, clock=clock) == 6.0
    assert runner.runs == [((3, 1), 0, [7, 7, 7]), ((3, 1), 0, [8, 8, 8])]


def test_every_slot_is_written_before_it_is_read() -> None:
    runner = FakeRunner(Clock())
    measure.fill(runner, 6, num_slots=3, chunk=4)
    assert [shape for shape, _, _ in runner.runs] == [(1, 4), (1, 2)]
    assert runner.copies == [(0, 1, 6), (0, 2, 6)]


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[FittedRuns, FakeRunner]]:
    """Fitted runs whose time is a clock that the runner moves."""

    def make(*, seconds: float, budget: float, rounds: int = 3) -> tuple[FittedRuns, FakeRunner]:
        clock = Clock()
        runner = FakeRunner(clock, seconds)
        for function in (measure.prefill, measure.decode):
            monkeypatch.setitem(function.__kwdefaults__, "clock", clock)
        return FittedRuns(runner, chunk=64, rounds=rounds, budget_seconds=budget), runner

    return make


def test_a_fast_machine_runs_all_steps_and_a_slow_one_as_many_as_the_budget_allows(
    fitted: Callable[..., tuple[FittedRuns, FakeRunner]],
) -> None:
    # 4 goes of 2 streams in 40 s, at 0.5 s for a token: 10 steps of 1 s each.
    for seconds, steps in ((0.001, MAX_STEPS), (0.5, 10), (4.0, MIN_STEPS)):
        runs, _ = fitted(seconds=seconds, budget=40.0)
        assert runs.decode(2, 8) == pytest.approx(1 / seconds)
        assert runs.num_steps == {(2, 8): steps}


def test_what_would_go_beyond_the_budget_or_the_context_is_not_begun(
    fitted: Callable[..., tuple[FittedRuns, FakeRunner]],
) -> None:
    runs, runner = fitted(seconds=1.0, budget=30.0)
    assert runs.prefill(20) == 1.0
    assert runs.expected_prefill(100) == 100.0
    done = len(runner.runs)
    with pytest.raises(NotMeasurableError, match="prompt before it would take 50 s, more than the budget of 30 s"):
        runs.decode(1, 50)
    for context in (253, 2_000):
        with pytest.raises(NotMeasurableError, match="the context has 256 positions"):
            runs.decode(1, context)
    with pytest.raises(NotMeasurableError, match="the context has 256 positions"):
        runs.prefill(257)
    assert len(runner.runs) == done
    slow, _ = fitted(seconds=10.0, budget=30.0)
    with pytest.raises(NotMeasurableError, match="4 steps would take 40 s, more than the budget of 30 s"):
        slow.decode(1, 2)


def test_kv_that_a_prompt_wrote_is_not_written_again(fitted: Callable[..., tuple[FittedRuns, FakeRunner]]) -> None:
    runs, runner = fitted(seconds=0.0001, budget=30.0)
    runs.prefill(100)
    runs.decode(1, 100)
    assert runner.copies == []
    assert sum(shape == (1, 64) for shape, _, _ in runner.runs) == 1
    runs.decode(2, 100)
    assert runner.copies == [(0, 1, 100)]


# Rounds


def test_measurements_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    values = {"a": iter([100.0, 3.0, 1.0, 8.0]), "b": iter([0.0, 5.0, 7.0, 6.0])}

    def measurement(key: str) -> Measurement[str]:
        def run() -> float:
            order.append(key)
            return next(values[key])

        return Measurement(key, run)

    figures, left_out = take_turns([measurement("a"), measurement("b")], rounds=3, budget_seconds=1e9)
    assert order == ["a", "b"] * 4
    assert figures == {"a": Figure(3.0, 1.0, 8.0, 3), "b": Figure(6.0, 5.0, 7.0, 3)}
    assert left_out == {}


def test_a_figure_of_the_only_round_is_kept() -> None:
    assert Figure.of([4.0]) == Figure(4.0, 4.0, 4.0, 1)
    assert Figure.of([9.0, 1.0, 4.0]) == Figure(2.5, 1.0, 4.0, 2)


def test_each_measurement_keeps_to_its_budget() -> None:
    clock = Clock()

    def taking(seconds: float) -> Callable[[], float]:
        def run() -> float:
            clock.now += seconds
            return seconds

        return run

    def refuse() -> float:
        raise NotMeasurableError("no such thing here")

    figures, left_out = take_turns(
        [
            Measurement("short", taking(1.0)),
            Measurement("long", taking(4.0)),
            Measurement("once", taking(9.0), lambda: 9.0),
            Measurement("too long", taking(11.0), lambda: 11.0),
            Measurement("impossible", refuse),
        ],
        rounds=5,
        budget_seconds=10.0,
        clock=clock,
    )
    assert {key: figure.rounds for key, figure in figures.items()} == {"short": 5, "long": 1, "once": 1}
    assert left_out == {
        "too long": "would take 11 s, more than the budget of 10 s",
        "impossible": "no such thing here",
    }
    assert clock.now == 6 * 1.0 + 2 * 4.0 + 9.0


# Bytes of a decode step


def tiny_graph(**attention: int) -> onnx.GraphProto:
    """An embedding of 10 rows, a matmul of 4 x 6 in int8 and its scales, two layers of KV with 2 heads of 8."""
    value = helper.make_tensor_value_info
    cache = ["B", 2, "max_len", 8]
    nodes = [
        helper.make_node("Gather", ["embedding", "ids"], ["rows"]),
        helper.make_node("Gather", ["embedding_scale", "ids"], ["row_scales"]),
        helper.make_node("MatMulIntegerToFloat", ["rows", "weight", "a_scale", "scale"], ["qkv"]),
        *(
            helper.make_node(
                "GroupQueryAttention",
                ["qkv", "", "", f"past_key.{layer}", f"past_value.{layer}", "last", "total", "cos", "sin"],
                [f"out.{layer}"],
                **(attention if layer else {}),
            )
            for layer in range(2)
        ),
    ]
    tensor = helper.make_tensor
    initializers = [
        tensor("embedding", TensorProto.INT8, [10, 4], bytes(40), raw=True),
        tensor("embedding_scale", TensorProto.FLOAT, [10, 1], bytes(40), raw=True),
        tensor("weight", TensorProto.INT8, [4, 6], bytes(24), raw=True),
        tensor("scale", TensorProto.FLOAT, [6], bytes(24), raw=True),
        tensor("cos", TensorProto.FLOAT, [32, 4], bytes(512), raw=True),
        tensor("sin", TensorProto.FLOAT, [32, 4], bytes(512), raw=True),
        tensor("read by nobody", TensorProto.FLOAT, [100], bytes(400), raw=True),
    ]
    inputs = [
        value("ids", TensorProto.INT64, ["B", "S"]),
        *(value(f"past_key.{layer}", TensorProto.FLOAT, cache) for layer in range(2)),
        *(value(f"past_value.{layer}", TensorProto.INT8, cache) for layer in range(2)),
    ]
    return helper.make_graph(nodes, "tiny", inputs, [], initializers)


def test_a_step_reads_every_weight_one_row_of_each_table_and_the_kv() -> None:
    traffic = StepTraffic.of_graph(tiny_graph())
    # weight 24 + scale 24; rows: 4 of the embedding, 4 of its scale, 16 of cos and of sin.
    assert (traffic.weight_bytes, traffic.row_bytes) == (48, 40)
    # A position of a layer: keys 2 x 8 x 4 bytes, values 2 x 8 x 1.
    assert traffic.kv == ((80, 0), (80, 0))
    assert traffic.kv_bytes_per_position == 160
    assert traffic.bytes_per_step(num_streams=1, context=10) == 48 + 40 + 10 * 160
    assert traffic.bytes_per_step(num_streams=3, context=10) == 48 + 3 * (40 + 10 * 160)


def test_a_sliding_window_bounds_what_a_layer_reads() -> None:
    traffic = StepTraffic.of_graph(tiny_graph(local_window_size=4))
    assert traffic.kv == ((80, 0), (80, 4))
    assert traffic.bytes_per_step(num_streams=1, context=10) == 88 + 80 * 10 + 80 * 4
    assert traffic.bytes_per_step(num_streams=1, context=3) == 88 + 80 * 3 * 2


def test_an_embedding_that_a_matmul_reads_too_is_read_in_full() -> None:
    graph = tiny_graph()
    graph.node.append(helper.make_node("MatMulIntegerToFloat", ["rows", "embedding"], ["logits"]))
    assert StepTraffic.of_graph(graph).weight_bytes == 48 + 40


def test_a_file_that_is_no_graph_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff no graph")
    with pytest.raises(BundleError, match=r"model\.onnx is no ONNX model") as caught:
        StepTraffic.of_model(tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)


# The machine


def test_bandwidth_is_the_buffer_by_the_fastest_pass_of_all_operations() -> None:
    buffer = make_buffer(1)
    assert buffer.nbytes == MIN_BUFFER_BYTES
    assert np.all(buffer == 1), "pages that nobody wrote to are one page of zeros, in a cache"
    # Start and end of six passes: 2, 4, 1, 8, 3 and 5 seconds.
    times = iter([0.0, 2.0, 2.0, 6.0, 6.0, 7.0, 7.0, 15.0, 15.0, 18.0, 18.0, 23.0])
    with ReadBandwidth(buffer, 2, clock=lambda: next(times)) as reading:
        assert reading.measure() == MIN_BUFFER_BYTES / 1.0
    assert next(times, None) is None


def test_every_thread_reads_its_own_part_and_together_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Summing:
        def __init__(self) -> None:
            self.parts: list[int] = []
            self.threads: set[int] = set()
            self._both = threading.Barrier(2)

        def reduce(self, part: NDArray[np.int64]) -> None:
            self._both.wait(timeout=30)
            self.threads.add(threading.get_ident())
            self.parts.append(int(part.sum()))

    summing = Summing()
    monkeypatch.setattr("hearthd.bench.bandwidth._REDUCTIONS", (summing,))
    buffer = np.arange(1001)
    with ReadBandwidth(buffer, 2) as reading:
        assert reading.measure() > 0
    assert len(summing.threads) == 2
    assert len(summing.parts) == 4
    assert sum(summing.parts) == 2 * int(buffer.sum())


def test_what_is_resident_is_what_the_kernel_accounts_for(tmp_path: Path) -> None:
    """In a process of its own, in which nothing else allocates meanwhile."""
    (tmp_path / "model.data").write_bytes(bytes(range(256)) * 2**15)
    program = f"""
import json, mmap
from dataclasses import asdict
from pathlib import Path
from hearthd.bench.fresh import FreshProcess
from hearthd.board.machine import ResidentSet
before = ResidentSet.of_this_process(Path({str(tmp_path)!r}))
with open({str(tmp_path / "model.data")!r}, "rb") as file:
    weights = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
assert sum(weights[::4096]) >= 0
kv = mmap.mmap(-1, 2**22)
kv[:] = bytes([1]) * len(kv)
after = ResidentSet.of_this_process(Path({str(tmp_path)!r}))
rollup = Path("/proc/self/smaps_rollup").read_text().split("Rss:")[1].split()[0]
print(json.dumps([asdict(before), asdict(after), int(rollup) * 1024]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after, rollup = json.loads(done.stdout)
    assert after["weights"] - before["weights"] == 2**23
    assert after["own"] - before["own"] == pytest.approx(2**22, abs=2**21)
    assert after["total"] == after["own"] + after["files"]
    assert after["total"] == pytest.approx(rollup, rel=0.05)


def test_the_machine_is_named() -> None:
    machine = Machine.here()
    assert machine.name
    assert machine.cpus == len(os.sched_getaffinity(0))
    assert str(machine).startswith(f"{machine.name} (")


def test_a_machine_without_the_memory_is_refused_before_anything_is_loaded() -> None:
    check_room(10, 10)
    with pytest.raises(BenchError, match=r"takes up to 900 MB of memory, and 500 MB are available; stop the daemon"):
        check_room(900 * 10**6, 500 * 10**6)


# The command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("state") / "models" / "tiny"
    return tiny_bundle(directory, tiny_checkpoint(tmp_path_factory.mktemp("bench")), context_length=CONTEXT)


@pytest.fixture
def state(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tiny.path.parent.parent))
    monkeypatch.setenv("CONFIGURATION_DIRECTORY", str(tiny.path.parent))


def check_shape(result: dict[str, Any], threads: int) -> None:
    """What whoever reads the object relies on."""
    assert result["threads"] == threads
    assert 0 < result["load"]["lowest"] <= result["load_seconds"] <= result["load"]["highest"]
    assert result["resident_mb"] == result["memory"]["used"]["resident_mb"] > 0
    for moment in result["memory"].values():
        assert moment["resident_mb"] == pytest.approx(moment["own_mb"] + moment["files_mb"], abs=0.11)
        assert moment["weights_mb"] <= moment["files_mb"]
    for each in [*result["prefill"], *result["decode"]]:
        assert 0 < each["lowest"] <= each["tokens_per_second"] <= each["highest"]
    for each in result["roofline"]:
        ceiling = each["bandwidth_gb_per_second"] * 1e9 / each["bytes_per_token"]
        assert each["ceiling_tokens_per_second"] == pytest.approx(ceiling, rel=0.01, abs=0.06)
        assert each["share"] == pytest.approx(each["tokens_per_second"] / ceiling, rel=0.01, abs=0.001)
    assert [each["threads"] for each in result["roofline"]] == sorted({1, threads})
    chosen = result["roofline"][-1]
    assert result["bandwidth_share"] == chosen["share"]
    assert result["bandwidth_gb_per_second"] == chosen["bandwidth_gb_per_second"] > 0
    short = next(each for each in result["decode"] if (each["streams"], each["context"]) == (1, 64))
    assert short["tokens_per_second"] == chosen["tokens_per_second"]
    for name in ("machine", "model", "hearthd", "onnxruntime"):
        assert result[name]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("state")
def test_bench_prints_one_object(threads: int, tiny: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tiny", "--threads", str(threads), "--rounds", "2", "--quick", "--json"]) == 0
    captured = capfd.readouterr()
    assert captured.err == "", "progress is for terminals"
    result = json.loads(captured.out)
    check_shape(result, threads)
    assert result["model"] == "tiny"
    assert [each["tokens"] for each in result["prefill"]] == [32, 64, 128]
    assert [(each["streams"], each["context"]) for each in result["decode"]] == [(1, 64), (2, 64), (4, 64), (8, 64)]
    assert {each["reason"] for each in result["skipped"]} == {f"the context has {CONTEXT} positions"}
    assert len(result["skipped"]) == 4 + 3
    traffic = StepTraffic.of_model(tiny.model_path)
    steps = next(each["steps"] for each in result["decode"] if each["streams"] == 1)
    assert result["bytes_per_token"] == round(traffic.bytes_per_step(num_streams=1, context=64 + (steps - 1) / 2))
    assert result["memory"]["full_slot"]["tokens"] == result["context_length"] == CONTEXT


@pytest.mark.usefixtures("state")
def test_bench_prints_a_table_that_names_machine_model_threads_and_versions(
    tiny: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tiny.path), "--threads", "1", "--quick"]) == 0
    shown = capsys.readouterr().out
    assert f"**tiny** on {Machine.here()}, threads: 1" in shown
    assert "onnxruntime" in shown
    assert "| writing, 8 streams after 64 |" in shown
    assert f"- left out: prefill of 2,048 tokens: the context has {CONTEXT} positions" in shown
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {6, 7}


@pytest.mark.usefixtures("state")
def test_the_configuration_says_what_is_measured_without_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hearthd.toml"
    file.write_text('[model]\nname = "tiny"\n[engine]\nthreads = 1\nsolo_prefill_chunk = 32\ncontext_length = 128\n')
    assert main(["bench", "--quick", "--json", "--config", str(file)]) == 0
    result = json.loads(capsys.readouterr().out)
    found = {name: result[name] for name in ("model", "threads", "prefill_chunk", "context_length")}
    assert found == {"model": "tiny", "threads": 1, "prefill_chunk": 32, "context_length": 128}


@pytest.mark.usefixtures("state")
def test_a_model_that_is_not_there_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "other"]) == 78
    assert "model 'other' is not installed" in capsys.readouterr().err
    assert main(["bench", str(tmp_path / "nothing")]) == 78
    captured = capsys.readouterr()
    assert "nothing is not a model directory" in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.usefixtures("state")
def test_no_memory_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("hearthd.bench.suite.available_bytes", lambda: 10**6)
    assert main(["bench", "tiny", "--json"]) == 1
    captured = capsys.readouterr()
    assert "1 MB are available" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("threads", ["0", "-1", "two", "257", "\u0664", ""])
def test_a_number_of_threads_that_cannot_be_is_wrong_usage(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", f"--threads={threads}"])
    assert caught.value.code == 2
    assert "is no whole number from 1 to 256" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_is_one_clear_line(tmp_path: Path) -> None:
    fresh = FreshProcess(tmp_path / "gone", num_threads=1, context_length=64, chunk=64)
    with pytest.raises(BenchError, match=r"in a process of its own: /.*gone is not a model directory") as caught:
        fresh.load_seconds()
    assert "\n" not in str(caught.value)


@pytest.mark.model
def test_the_real_model_is_measured_on_this_machine(default_bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(default_bundle.path), "--threads", "2", "--quick", "--json"]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    result = json.loads(captured.out)
    check_shape(result, 2)
    # The matmuls of 134 million weights in a byte each, their scales, and 64 positions of 46 KB and less.
    assert 134.4e6 < result["bytes_per_token"] < 145e6
    # On a busy machine some do not fit the budget; each is in one of the two lists.
    assert len(result["prefill"]) + sum("prefill" in each["what"] for each in result["skipped"]) == 7
    assert len(result["decode"]) + sum("decode" in each["what"] for each in result["skipped"]) == 7
    assert result["memory"]["used"]["own_mb"] > result["memory"]["loaded"]["own_mb"]
