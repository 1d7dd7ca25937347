"""The comparison with other engines: its arithmetic, its table, and that one engine's failure is a row and no end."""

import importlib
import importlib.util
import json
import mmap
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from checkpoints import tiny_models, write_gguf
from hearthd.build.checkpoints.checkpoint import open_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SCRIPTED_ENGINE = Path(__file__).resolve().parent / "scripted_engine.py"


@pytest.fixture(scope="module")
def peers() -> Any:
    """The modules of benchmarks/peers, which find each other by their directory, as the workers do."""
    sys.path.insert(0, str(ROOT / "benchmarks/peers"))
    try:
        modules = {name: importlib.import_module(name) for name in ("figures", "contest", "report", "plot", "install")}
        yield type("Peers", (), modules)
    finally:
        sys.path.remove(str(ROOT / "benchmarks/peers"))


def contestant(peers: Any, name: str, script: dict[str, Any] | None = None, *, peer: str = "", **changes: Any) -> Any:
    command = (Path(sys.executable), SCRIPTED_ENGINE, json.dumps(script or {}))
    return peers.contest.Contestant(name, name.title(), peer or name, **{"command": command, "options": {}} | changes)


def run(peers: Any, tmp_path: Path, *contestants: Any, **plan: Any) -> Any:
    small = {"prompts": (32,), "contexts": (64,), "streams": (2,), "steps": 4, "rounds": 2, "slot": 128} | plan
    contest = peers.contest.Contest(
        contestants, peers.contest.Plan(**small), vocab_size=1000, logs=tmp_path, report=lambda text: None
    )
    contest.run()
    return contest


def test_the_first_round_warms_up_and_does_not_count(peers: Any) -> None:
    samples, figure = peers.figures.Samples(), peers.figures.Figure("prefill", 1, 32)
    for value in (1.0, 30.0, 10.0, 20.0):
        samples.add("one", figure, value)
    assert samples.rounds("one", figure) == [30.0, 10.0, 20.0]
    assert peers.figures.summarise(samples.rounds("one", figure)) == peers.figures.Summary(20.0, 10.0, 30.0)


def test_a_ratio_is_of_the_values_of_one_round_and_then_the_median(peers: Any) -> None:
    # The ratio of the medians would be 20 / 10 = 2; the machine was slow in the second round, for both.
    assert peers.figures.ratio([20, 6, 40], [10, 4, 10], more_is_better=True) == peers.figures.Summary(2.0, 1.5, 4.0)
    assert peers.figures.ratio([30, 8, 20], [10, 4, 20], more_is_better=True).median == 2.0
    # Of seconds the smaller is the better.
    assert peers.figures.ratio([2.0], [3.0], more_is_better=False).median == 1.5


def test_a_ratio_of_different_rounds_is_refused(peers: Any) -> None:
    with pytest.raises(ValueError, match="shorter"):
        peers.figures.ratio([1.0, 2.0], [1.0], more_is_better=True)


def test_each_figure_is_compared_with_the_best_setting_of_a_peer(peers: Any, tmp_path: Path) -> None:
    contest = run(
        peers,
        tmp_path,
        contestant(peers, "ours", {"prefill": [{"tokens": 100, "seconds": 0.25}]}),
        contestant(peers, "slow-decode", {"decode": [{"tokens": 1, "seconds": 1.0}]}, peer="other"),
        contestant(peers, "slow-prefill", {"prefill": [{"tokens": 100, "seconds": 2.0}]}, peer="other"),
    )
    lines = peers.report.results(contest.samples, contest.plan.figures, contest._contestants, "ours")
    found = {(line["what"], line["streams"], line["tokens"]): line["ratios"] for line in lines}
    assert found["prefill", 1, 32]["other"] == {"against": "slow-decode", "median": 2.0, "lowest": 2.0, "highest": 2.0}
    assert found["decode", 1, 64]["other"]["against"] == "slow-prefill"
    assert found["decode", 1, 64]["other"]["median"] == 1.0
    assert found["resident", 1, 128]["other"]["median"] == 1.0
    # A part of the memory is no figure to be better in.
    assert found["own", 1, 128] == {}


@pytest.mark.parametrize(
    ("failure", "reason"),
    [("die", r"the process ended in 'prefill' \(signal 9\)"), ("hang", "'prefill' took longer than 2 s")],
)
def test_an_engine_that_dies_or_hangs_loses_that_figure_only(
    peers: Any, tmp_path: Path, failure: str, reason: str
) -> None:
    broken = contestant(peers, "broken", {"prefill": [failure]})
    contest = run(peers, tmp_path, contestant(peers, "ours"), broken, budget=2.0, slot=64)
    prefill, decode = peers.figures.Figure("prefill", 1, 32), peers.figures.Figure("decode", 1, 64)
    assert re.fullmatch(reason, contest.samples.missing["broken", prefill])
    assert contest.samples.rounds("broken", decode) == [5.0, 5.0]
    assert contest.samples.rounds("ours", prefill) == [200.0, 200.0]
    # What a fresh process had given before it broke is kept; what came after is not there.
    assert contest.samples.rounds("broken", peers.figures.Figure("load"))
    assert ("broken", peers.figures.Figure("resident", 1, 64)) in contest.samples.missing


def test_a_figure_that_fails_in_a_late_round_is_not_summarised_from_the_early_ones(peers: Any, tmp_path: Path) -> None:
    good = {"tokens": 100, "seconds": 0.5}
    contest = run(peers, tmp_path, contestant(peers, "broken", {"decode": [good, good, {"error": "no memory left"}]}))
    figures = [figure for figure in contest.plan.turns if figure.what == "decode"]
    assert contest.samples.missing["broken", figures[0]] == "no memory left"
    assert contest.samples.rounds("broken", figures[0]) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"refused": "pip ended with 1: no such version"}, "pip ended with 1: no such version"),
        ({"command": (Path("/nonexistent/python"),)}, "cannot be started: No such file or directory"),
        ({"script": {"load": [{"error": "no such model"}]}}, "cannot be loaded: no such model"),
    ],
)
def test_an_engine_that_cannot_take_part_is_a_row_with_the_reason(
    peers: Any, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    absent = contestant(peers, "absent", **changes)
    contest = run(peers, tmp_path, contestant(peers, "ours"), absent)
    lines = peers.report.results(contest.samples, contest.plan.figures, contest._contestants, "ours")
    assert all(line["engines"]["absent"] == {"missing": reason} for line in lines)
    assert all("median" in line["engines"]["ours"] for line in lines)
    text = peers.report.markdown(whole_report(contest, lines))
    assert f"- Absent: {reason}: prefill, 32 tokens, decode, 1 stream, context 64" in text
    assert "| prefill, 32 tokens (tokens/s) | 200 (200-200) | not measured |" in text


def whole_report(contest: Any, lines: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "machine": {"processor": "Abacus & Sons", "cores": 2, "flags": ["beads"]},
        "date": "2026-11-22",
        "settings": {"model": "tiny", "threads": 1, "rounds": contest.plan.rounds},
        "engines": {one.name: {"title": one.title, "peer": one.peer} for one in contest._contestants},
        "figures": lines,
    }


def test_the_table_names_the_machine_and_the_ratios(peers: Any, tmp_path: Path) -> None:
    contest = run(
        peers, tmp_path, contestant(peers, "ours"), contestant(peers, "peer", {"decode": [{"tokens": 4, "seconds": 2}]})
    )
    lines = peers.report.results(contest.samples, contest.plan.figures, contest._contestants, "ours")
    text = peers.report.markdown(whole_report(contest, lines))
    assert text.startswith("tiny on Abacus & Sons (beads), 2 cores,\n1 threads, 2026-11-22.")
    assert "| decode, 2 streams, context 64 (tokens/s) | 5.00 (5.00-5.00) | 2.00 (2.00-2.00) |" in text
    assert "| decode, 2 streams, context 64 | 2.50 (2.50-2.50) |" in text
    assert "Not measured" not in text
    json.dumps(lines)


def test_the_plot_is_well_formed_and_has_a_line_for_each_engine(peers: Any, tmp_path: Path) -> None:
    contest = run(peers, tmp_path, contestant(peers, "ours"), contestant(peers, "gone", refused="no compiler"))
    lines = peers.report.results(contest.samples, contest.plan.figures, contest._contestants, "ours")
    root = ElementTree.fromstring(peers.plot.draw(whole_report(contest, lines)))
    drawn = [line.get("points") for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    # Three panels with two engines each, of which one has no points.
    assert [bool(points) for points in drawn] == [True, False] * 3


def test_everyone_gets_the_same_tokens_and_no_control_tokens(peers: Any) -> None:
    first = peers.contest.token_ids(500, 1000)
    assert first == peers.contest.token_ids(500, 1000)
    assert 100 <= min(first) <= max(first) < 1000
    assert len(set(first)) > 250


def test_decoding_starts_after_the_context_and_streams_share_no_text(peers: Any) -> None:
    worker = importlib.import_module("worker")
    prompts: list[tuple[int, list[int]]] = []
    decoded: list[list[int]] = []

    class Recorder:
        def prepare(self, streams: int, length: int) -> int:
            return 0

        def prefill(self, stream: int, token_ids: Any) -> int:
            prompts.append((stream, token_ids.tolist()))
            return 0

        def prefill_all(self, token_ids: Any) -> None:
            return None

        def decode(self, token_ids: list[int]) -> list[int]:
            decoded.append(token_ids)
            return [7] * len(token_ids)

    answer = worker._decode(Recorder(), 2, np.arange(10, 20), 3, 60.0)
    assert answer["tokens"] == 6
    # Nine of the context's ten tokens are read, the tenth is decoded untimed, and three steps are timed.
    assert prompts == [(0, [*range(10, 19)]), (1, [*range(12, 19), 10, 11])]
    assert decoded == [[19, 19], [7, 7], [7, 7], [7, 7]]


def test_slow_decoding_stops_at_its_budget(peers: Any) -> None:
    worker = importlib.import_module("worker")

    class Ready:
        def prepare(self, streams: int, length: int) -> int:
            return length

        def decode(self, token_ids: list[int]) -> list[int]:
            return token_ids

    assert worker._decode(Ready(), 1, np.arange(10), 1000, 0.0)["tokens"] == 1


def test_memory_is_what_the_kernel_says_and_its_parts_add_up(peers: Any) -> None:
    worker = importlib.import_module("worker")
    before = worker.memory()
    # Not from malloc, which may have as much free already.
    held = mmap.mmap(-1, 50 * 2**20)
    np.frombuffer(held, np.uint8)[:] = 1
    after = worker.memory()
    assert 45 < after["own_mb"] - before["own_mb"] < 60
    assert after["own_mb"] + after["file_mb"] == pytest.approx(after["resident_mb"])
    assert len(held)


def test_requirements_pin_by_name_and_version_only(peers: Any) -> None:
    for peer in peers.install.PEERS:
        lines = (peers.install.REQUIREMENTS / f"{peer}.txt").read_text(encoding="utf-8").splitlines()
        pins = [line for line in lines if line and not line.startswith("#")]
        assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line)] == []
        assert pins


def test_what_was_installed_is_not_installed_again(peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    installer = peers.install.Installer(tmp_path, tmp_path / "none.gguf", lambda text: None)

    def record(command: list[Any], environment: Any = None) -> None:
        commands.append([str(part) for part in command])
        (tmp_path / "environments/optimum").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(installer, "_run", record)
    python = installer.python("optimum")
    assert [command[1:3] for command in commands] == [["-m", "venv"], ["-m", "pip"]]
    assert installer.python("optimum") == python
    assert len(commands) == 2


def test_a_failed_installation_says_what_the_program_said(peers: Any, tmp_path: Path) -> None:
    installer = peers.install.Installer(tmp_path, tmp_path / "none.gguf", lambda text: None)
    program = "import sys; print('first', flush=True); print('no such version', file=sys.stderr); sys.exit(3)"
    with pytest.raises(peers.install.InstallError, match="ended with 3: no such version"):
        installer._run([sys.executable, "-c", program])


def test_a_checkpoint_becomes_a_directory_that_reads_back_the_same(peers: Any, tmp_path: Path) -> None:
    directory = importlib.import_module("huggingface_directory")
    write_gguf(tmp_path / "tiny.gguf", tiny_models()["smollm2"])
    directory.write_huggingface_directory(tmp_path / "tiny.gguf", tmp_path / "written")
    with open_checkpoint(tmp_path / "tiny.gguf") as original, open_checkpoint(tmp_path / "written") as written:
        assert written.tensor_names == original.tensor_names
        for name in original.tensor_names:
            np.testing.assert_array_equal(written.tensor(name), original.tensor(name))
        assert written.config["rope_theta"] == original.config["rope_theta"]
        assert written.eos_ids == original.eos_ids
        assert written.chat_template == original.chat_template


@pytest.mark.model
def test_make_bench_measures_the_real_engine(peers: Any, tmp_path: Path) -> None:
    compare = compare_program()
    arguments = ["--only", "hearth", "--rounds", "1", "--prompts", "32", "--contexts", "40", "--streams", "2"]
    assert compare.main([*arguments, "--steps", "2", "--slot", "64", "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "comparison.json").read_text())
    cells = [line["engines"]["hearth"] for line in written["figures"]]
    assert all(cell["median"] > 0 for cell in cells)
    assert written["machine"]["processor"] in (tmp_path / "comparison.md").read_text()
    assert (tmp_path / "comparison.svg").read_text().startswith("<svg")


def compare_program() -> ModuleType:
    # tests/arm64 has a compare.py too: this one is loaded by its path.
    specification = importlib.util.spec_from_file_location("compare_engines", ROOT / "benchmarks/compare.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
