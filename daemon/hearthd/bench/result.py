"""What was measured, as the one object that `--json` prints and as Markdown for a person.

Units: MB are 10^6 bytes, GB 10^9. Knows no terminal. Called by `cli`.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from hearthd.bench.suite import SHORT_CONTEXT, Decode, Load, Measured, Prefill, Read
from hearthd.bench.turns import Figure
from hearthd.board.machine import Machine
from hearthd.bundles.bundle import Bundle
from hearthd.version import daemon_version

__all__ = ["to_markdown", "to_object"]


def to_object(bundle: Bundle, machine: Machine, measured: Measured) -> dict[str, Any]:
    """Return what `--json` prints."""
    plan, figures = measured.plan, measured.figures
    load, read = figures[Load()], figures[Read(plan.num_threads)]
    roofline = [
        _roofline(measured, threads)
        for threads in sorted({1, plan.num_threads})
        if Decode(1, SHORT_CONTEXT, threads) in figures
    ]
    chosen = next((each for each in roofline if each["threads"] == plan.num_threads), {})
    return {
        "machine": str(machine),
        "model": bundle.manifest.name,
        "hearthd": daemon_version(),
        "onnxruntime": metadata.version("onnxruntime"),
        "numpy": metadata.version("numpy"),
        "threads": plan.num_threads,
        "context_length": measured.context_length,
        "prefill_chunk": plan.chunk,
        "rounds": plan.rounds,
        "budget_seconds": plan.budget_seconds,
        "load_seconds": round(load.median, 3),
        "load": {"lowest": round(load.lowest, 3), "highest": round(load.highest, 3), "rounds": load.rounds},
        "resident_mb": _mb(measured.fresh["used"]["total"]),
        "memory": {
            moment: {
                "tokens": int(measured.fresh[moment]["tokens"]),
                "resident_mb": _mb(measured.fresh[moment]["total"]),
                "own_mb": _mb(measured.fresh[moment]["own"]),
                "files_mb": _mb(measured.fresh[moment]["files"]),
                "weights_mb": _mb(measured.fresh[moment]["weights"]),
            }
            for moment in ("loaded", "used", "full_slot")
            if moment in measured.fresh
        },
        "prefill": [
            {"tokens": key.tokens, **_rate(figure)} for key, figure in figures.items() if isinstance(key, Prefill)
        ],
        "decode": [
            {"streams": key.streams, "context": key.context, "steps": measured.num_steps[key], **_rate(figure)}
            for key, figure in sorted(_decodes(measured).items(), key=lambda each: (each[0].context, each[0].streams))
        ],
        "bandwidth_gb_per_second": _gb(read.median),
        "bandwidth": {
            "lowest": _gb(read.lowest),
            "highest": _gb(read.highest),
            "rounds": read.rounds,
            "buffer_mb": _mb(measured.buffer_bytes),
        },
        "bytes_per_token": chosen.get("bytes_per_token"),
        "bandwidth_share": chosen.get("share"),
        "roofline": roofline,
        "skipped": [{"what": str(key), "reason": reason} for key, reason in measured.left_out.items()],
    }


def _decodes(measured: Measured) -> dict[Decode, Figure]:
    threads = measured.plan.num_threads
    return {
        key: figure for key, figure in measured.figures.items() if isinstance(key, Decode) and key.threads == threads
    }


def _roofline(measured: Measured, threads: int) -> dict[str, Any]:
    """How near decoding comes to reading its bytes at the memory's speed, with so many threads on both sides."""
    key = Decode(1, SHORT_CONTEXT, threads)
    rate, bandwidth = measured.figures[key].median, measured.figures[Read(threads)].median
    # Each step has one position more behind it than the one before.
    context = SHORT_CONTEXT + (measured.num_steps[key] - 1) / 2
    size = measured.traffic.bytes_per_step(num_streams=1, context=context)
    return {
        "threads": threads,
        "bandwidth_gb_per_second": _gb(bandwidth),
        "bytes_per_token": round(size),
        "ceiling_tokens_per_second": round(bandwidth / size, 1),
        "tokens_per_second": round(rate, 2),
        "share": round(rate * size / bandwidth, 3),
    }


def _rate(figure: Figure) -> dict[str, float]:
    return {
        "tokens_per_second": round(figure.median, 2),
        "lowest": round(figure.lowest, 2),
        "highest": round(figure.highest, 2),
        "rounds": figure.rounds,
    }


def _mb(size: float) -> float:
    return round(size / 1e6, 1)


def _gb(size: float) -> float:
    return round(size / 1e9, 2)


def to_markdown(result: dict[str, Any]) -> str:
    """Return the object's figures as Markdown."""
    load = result["load"]
    about = (
        f"hearthd {result['hearthd']}, onnxruntime {result['onnxruntime']}, numpy {result['numpy']}; slots of "
        f"{result['context_length']:,} tokens, prompts in chunks of {result['prefill_chunk']}"
    )
    method = (
        f"Medians of {result['rounds']} rounds in which all measurements take turns, fewer where a row says so, at "
        f"most {result['budget_seconds']:g} s for each. The model's runs alone, without sampling and gRPC."
    )
    loading = (
        f"Opening the bundle to the first token, files in the page cache: {result['load_seconds']} s "
        f"({load['lowest']} to {load['highest']}, {_count(load['rounds'], 'process')})."
    )
    blocks = [
        [f"**{result['model']}** on {result['machine']}, threads: {result['threads']}  ", f"{about}  ", method],
        _speed_table(result),
        _memory_table(result["memory"]),
        [loading],
        _roofline_table(result["roofline"]),
        [f"- left out: {each['what']}: {each['reason']}" for each in result["skipped"]],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _speed_table(result: dict[str, Any]) -> list[str]:
    rows = [(f"reading a prompt of {each['tokens']:,}", each) for each in result["prefill"]]
    rows += [
        (f"writing, {_count(each['streams'], 'stream')} after {each['context']:,}", each) for each in result["decode"]
    ]
    return [
        "| what | tokens/s | lowest | highest | rounds |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {what} | {each['tokens_per_second']:,.1f} | {each['lowest']:,.1f} | {each['highest']:,.1f} "
            f"| {each['rounds']} |"
            for what, each in rows
        ),
    ]


def _memory_table(memory: dict[str, Any]) -> list[str]:
    titles = {
        "loaded": "loaded, first token written",
        "used": "after {tokens:,} tokens",
        "full_slot": "slot full, {tokens:,} tokens",
    }
    return [
        "| memory of a process with one slot, MB | resident | its own | mapped files | of which weights |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {titles[moment].format(**each)} | {each['resident_mb']} | {each['own_mb']} | {each['files_mb']} "
            f"| {each['weights_mb']} |"
            for moment, each in memory.items()
        ),
    ]


def _roofline_table(roofline: list[dict[str, Any]]) -> list[str]:
    return [
        "| threads | memory read, GB/s | MB read for a token | so at most, tokens/s | writes, tokens/s | share |",
        "|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {each['threads']} | {each['bandwidth_gb_per_second']} | {_mb(each['bytes_per_token'])} "
            f"| {each['ceiling_tokens_per_second']} | {each['tokens_per_second']} | {each['share']:.0%} |"
            for each in roofline
        ),
    ]


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"
