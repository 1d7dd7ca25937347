"""`--report FILE`: what a build made of a checkpoint and how good it is, as one page with plots.

Looks at a build that has ended and changes nothing of it: a report that fails is an error to be told, no reason to lose
a model. Where the page goes is proved before the build begins. Made by `cli`; `builder` calls `observe`.
"""

from __future__ import annotations

import os
import platform
import resource
import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from hearthd.board.machine import Machine
from hearthd.build.builder import Built
from hearthd.build.decoder.recipe import MatMulName
from hearthd.build.decoder.weights import DecoderWeights
from hearthd.build.quantization.quality import MAX_KL
from hearthd.build.report import answers as report_answers
from hearthd.build.report import sections as report_sections
from hearthd.build.report.greedy_comparison import Comparison, compare_answers
from hearthd.build.report.page import details, escape, facts, page, paragraph, section, table
from hearthd.build.report.weight_ranges import WeightRange, weight_ranges
from hearthd.errors import BuildError

__all__ = ["BuildReport"]


class BuildReport:
    """A report on one build. `error` says after `observe` why there is none, None if there is one."""

    def __init__(self, path: Path, *, model_directory: Path) -> None:
        """path: of the page. model_directory: where the bundle will be.

        Raises BuildError, before anything is built, when the page cannot be written there.
        """
        self.path = path.absolute()
        self.error: str | None = None
        _prove_writable(self.path, model_directory.absolute())

    def observe(self, built: Built, progress: Callable[[str, float], None]) -> None:
        """Write the report on a build. Raises nothing: see `error`."""
        # Linux counts it in KiB. Taken first: what the report takes is not the build's.
        peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        try:
            ranges = weight_ranges(
                DecoderWeights(built.checkpoint, built.spec, rotated=built.found.recipe.rotated),
                built.spec,
                lambda share: progress("weight ranges", share),
            )
            comparisons = compare_answers(
                built.reference,
                built.directory,
                built.spec,
                built.tokenizer,
                preset=built.preset,
                context_length=built.reference.context_length,
                num_threads=built.num_threads,
                report=lambda share: progress("greedy answers", share),
            )
            _write(self.path, render(built, ranges, comparisons, peak_memory))
        except Exception as error:  # noqa: BLE001  whatever it is, the model that was built matters more
            self.error = " ".join(f"{type(error).__name__}: {error}".split())[:400]


def render(
    built: Built, ranges: dict[MatMulName, WeightRange], comparisons: Sequence[Comparison], peak_memory: int
) -> str:
    """Return the page. peak_memory: of the build, in bytes."""
    return page(
        f"{built.manifest.name}: build report",
        [
            _header(built, comparisons),
            _origin(built, peak_memory),
            report_sections.faithfulness(built.figures),
            report_answers.answers(comparisons, built.tokenizer),
            report_sections.recipe(built.found),
            report_sections.losses(built.found),
            report_sections.activations(built.found),
            report_sections.weights(built.found, ranges),
            f"<footer>{paragraph('Made by hearthd model build. This page loads nothing from anywhere.')}</footer>",
        ],
    )


def _header(built: Built, comparisons: Sequence[Comparison]) -> str:
    figures = built.figures
    change = figures.perplexity_int8 / figures.perplexity_fp32 - 1
    judged = "Faithful" if built.faithful else "Not faithful, and kept with --force only"
    verdict = (
        f"{judged}: mean KL {figures.kl_mean:.4f} nats, at most {MAX_KL:g} is allowed; "
        f"perplexity {change * 100:+.2f} %; the same likeliest token at {figures.top1_agreement:.1%} of "
        f"{figures.tokens:,} positions."
    )
    return (
        f'<header><p class="over">Build report</p><h1><bdi>{escape(built.manifest.name)}</bdi></h1>'
        f"{paragraph(verdict, 'verdict good' if built.faithful else 'verdict bad')}"
        f"{paragraph(report_answers.summary(comparisons), 'soft after')}</header>"
    )


def _origin(built: Built, peak_memory: int) -> str:
    manifest, spec = built.manifest, built.spec
    shape = (
        f"{spec.num_layers} layers, {spec.num_heads} heads of {spec.head_dim}, {spec.num_kv_heads} of keys and values"
    )
    versions = {**manifest.created_with, "Python": platform.python_version()}
    sizes = [(name, f"{entry.size / 1e6:,.2f}") for name, entry in manifest.files.items()]
    rows = {
        "source": manifest.source,
        "licence": manifest.license,
        "architecture": manifest.architecture,
        "shape": shape,
        "parameters": f"{manifest.parameter_count / 1e6:,.1f} million",
        "vocabulary": f"{manifest.vocab_size:,} tokens",
        "context": f"{manifest.context_length:,} tokens",
        "bundle": f"{manifest.size_bytes / 1e6:,.1f} MB",
        "built on": str(Machine.here()),
        "build took": f"{_duration(built.seconds)}, {built.num_threads} threads",
        "peak memory": f"{peak_memory / 1e6:,.0f} MB",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    files = details("The bundle's files", table("Size of each file", ("file", "MB"), sizes))
    return section("What was built from what", [facts(rows), files])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _prove_writable(path: Path, model_directory: Path) -> None:
    if path.suffix.lower() not in (".html", ".htm"):
        raise BuildError(f"the report {path.name!r} would be an HTML page; give a name that ends in .html")
    if path.is_relative_to(model_directory):
        raise BuildError(
            f"the report {path} would stand in the model's own directory, which the build replaces; name another place"
        )
    if path.exists() and not path.is_file():
        raise BuildError(f"the report cannot be written to {path}: it is there and no file; name another place")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        temporary.open("x").close()
        temporary.unlink()
    except OSError as error:
        raise BuildError(
            f"the report cannot be written to {path}: {error.strerror}; check its directory, or name another place"
        ) from error


def _write(path: Path, text: str) -> None:
    """Write a file so that it is there as a whole or not at all."""
    temporary = _temporary(path)
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".report-{secrets.token_hex(8)}")
