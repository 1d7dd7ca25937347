"""From a checkpoint to a bundle: calibrate, write the int8 graph, judge it against float32, seal it with a manifest.

Writes into a directory that the caller made, and knows neither the store nor where checkpoints come from. `store` puts
the finished directory into its place at once; nobody serves from one that a build is still writing. Called by `cli`.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hearthd.build.checkpoints.checkpoint import Checkpoint
from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.build.decoder.graph import GraphOptions, write_graph
from hearthd.build.decoder.weights import DecoderWeights
from hearthd.build.quantization import corpus
from hearthd.build.quantization.documents import MAX_DOCUMENT_TOKENS, TokenDocument, first_tokens, tokenize
from hearthd.build.quantization.oracle import Oracle
from hearthd.build.quantization.quality import (
    EVALUATION_TOKENS,
    MAX_KL,
    QualityFigures,
    Reference,
    ReferenceGraph,
    compare,
)
from hearthd.build.quantization.search import Found, find_recipe
from hearthd.bundles.bundle import MANIFEST_NAME, Bundle, Manifest, file_entry
from hearthd.bundles.manifest import GENERATION_NAME, PRESET_NAME, TEMPLATE_NAME, TOKENIZER_NAME
from hearthd.errors import BuildError
from hearthd.text.tokenizer import ChatTokenizer, Message

__all__ = ["Built", "Report", "build_bundle", "measure_quality"]

# Called with what is being done and the share of it that is done, 0 to 1.
Report = Callable[[str, float], None]

# Enough for the extremes of every kind of text, few enough for a board: some 25 s at 300 tokens/s.
_CALIBRATION_TOKENS = 4_800

# For a checkpoint that recommends nothing: small models ramble when all of the distribution may be drawn from.
_DEFAULT_SAMPLING = {"temperature": 0.7, "top_p": 0.95}

_PACKAGES = ("hearth-chat", "onnxruntime", "onnx", "numpy")


@dataclass(frozen=True, slots=True)
class _Parts:
    """What every step of a build needs."""

    checkpoint: Checkpoint
    spec: DecoderSpec
    tokenizer: ChatTokenizer
    scratch: Path
    num_threads: int

    def tokenized(self, documents: tuple[corpus.Document, ...], max_tokens: int) -> tuple[TokenDocument, ...]:
        """Return the texts as this model sees them, at most max_tokens of them."""
        return tokenize(documents, self.tokenizer, max_tokens=max_tokens, context_length=self.spec.max_context_length)


@dataclass(frozen=True, slots=True)
class Built:
    """What a build has at its end, to be looked at and not to be kept: it is gone when the build returns.

    directory: the bundle's. faithful: whether the figures are within the limits. seconds: that the build took.
    """

    checkpoint: Checkpoint
    spec: DecoderSpec
    tokenizer: ChatTokenizer
    reference: Reference
    directory: Path
    preset: NDArray[np.int8] | None
    found: Found
    figures: QualityFigures
    manifest: Manifest
    faithful: bool
    num_threads: int
    seconds: float


def build_bundle(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    name: str,
    force: bool = False,
    report: Report,
    observe: Callable[[Built], None] | None = None,
) -> Manifest:
    """Build an int8 bundle in `directory`, which is empty.

    Beside it, temporary room is needed: 10 bytes for each weight. observe: called once with what was built, be it
    faithful or not; it must not raise. Raises BuildError when the checkpoint is not supported or, unless `force`, when
    the mean KL to the float32 graph is over `quality.MAX_KL`.
    """
    started = time.monotonic()
    spec = DecoderSpec.from_config(checkpoint.config)
    tokenizer = ChatTokenizer(
        checkpoint.tokenizer_json,
        checkpoint.chat_template,
        bos_token=checkpoint.bos_token,
        eos_token=checkpoint.eos_token,
        eos_ids=checkpoint.config["eos_token_id"],
    )
    begin = first_tokens(tokenizer)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=directory.parent) as scratch:
        parts = _Parts(checkpoint, spec, tokenizer, Path(scratch), len(os.sched_getaffinity(0)))
        report("float32 reference", 0.0)
        reference = _reference(parts)
        first = reference.keys_and_values(begin) if begin else None
        found = find_recipe(
            checkpoint,
            spec,
            parts.tokenized(corpus.load("calibration"), _CALIBRATION_TOKENS),
            scratch=parts.scratch,
            preset=first,
            num_threads=parts.num_threads,
            report=report,
        )
        preset = None if first is None else found.kv_scales.quantized(first)
        report("int8 graph", 0.0)
        weights = DecoderWeights(checkpoint, spec, rotated=found.recipe.rotated)
        options = GraphOptions(context_length=spec.max_context_length, int8_embedding=True)
        write_graph(directory, spec, weights, found.recipe, options, found.rounding, found.kv_scales)
        evaluation = parts.tokenized(corpus.load("evaluation"), EVALUATION_TOKENS)
        figures = _judged(parts, reference, directory, evaluation, preset, report)
        _write_texts(checkpoint, directory)
        if preset is not None:
            np.save(directory / PRESET_NAME, preset)
        manifest = _manifest(parts, directory, name, begin, found, figures)
        faithful = figures.kl_mean <= MAX_KL
        if observe:
            observe(
                Built(
                    checkpoint=checkpoint,
                    spec=spec,
                    tokenizer=tokenizer,
                    reference=reference,
                    directory=directory,
                    preset=preset,
                    found=found,
                    figures=figures,
                    manifest=manifest,
                    faithful=faithful,
                    num_threads=parts.num_threads,
                    seconds=time.monotonic() - started,
                )
            )
    if not faithful and not force:
        raise BuildError(
            f"the int8 model is not faithful: mean KL {figures.kl_mean:.4f} to the float32 graph, at most {MAX_KL} is "
            "allowed; build from the original weights, or pass --force to keep it all the same"
        )
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def measure_quality(
    bundle: Bundle,
    checkpoint: Checkpoint,
    documents: tuple[corpus.Document, ...],
    *,
    max_tokens: int,
    scratch: Path,
    report: Report,
    exported_graph: Path | None = None,
) -> QualityFigures:
    """Judge a finished bundle against the checkpoint that it came from, on any text.

    max_tokens: of the text, in all. scratch: a directory with room for 4 bytes a weight. exported_graph: judge against
    this graph as it is, and not against one of the checkpoint's weights.
    """
    spec = DecoderSpec.from_config(checkpoint.config)
    _refuse_another_model(bundle.manifest, spec, checkpoint.source)
    tokenizer = ChatTokenizer.from_bundle(bundle)
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=scratch) as name:
        parts = _Parts(checkpoint, spec, tokenizer, Path(name), len(os.sched_getaffinity(0)))
        text = parts.tokenized(documents, max_tokens)
        reference: ReferenceGraph = (
            Oracle(exported_graph, spec, num_threads=parts.num_threads) if exported_graph else _reference(parts)
        )
        return _judged(parts, reference, bundle.path, text, bundle.preset(), report)


def _refuse_another_model(manifest: Manifest, spec: DecoderSpec, source: str) -> None:
    shape = (spec.architecture, spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.vocab_size)
    of_bundle = (
        *(manifest.architecture, manifest.num_layers, manifest.num_heads),
        *(manifest.num_kv_heads, manifest.vocab_size),
    )
    if shape != of_bundle:
        raise BuildError(
            f"{manifest.name} was not built from {source}: architecture, layers, heads, KV heads and vocabulary are "
            f"{of_bundle} of the one and {shape} of the other; name the checkpoint that it was built from"
        )


def _reference(parts: _Parts) -> Reference:
    directory = parts.scratch / "reference"
    directory.mkdir()
    length = min(MAX_DOCUMENT_TOKENS, parts.spec.max_context_length)
    return Reference(parts.checkpoint, parts.spec, directory, context_length=length, num_threads=parts.num_threads)


def _judged(
    parts: _Parts,
    reference: ReferenceGraph,
    directory: Path,
    documents: tuple[TokenDocument, ...],
    preset: NDArray[np.int8] | None,
    report: Report,
) -> QualityFigures:
    return compare(
        reference,
        directory,
        parts.spec,
        documents,
        preset=preset,
        num_threads=parts.num_threads,
        report=lambda share: report("quality", share),
    )


def _write_texts(checkpoint: Checkpoint, directory: Path) -> None:
    (directory / TOKENIZER_NAME).write_text(checkpoint.tokenizer_json, encoding="utf-8")
    (directory / TEMPLATE_NAME).write_text(checkpoint.chat_template, encoding="utf-8")
    generation = dict(checkpoint.generation or _DEFAULT_SAMPLING)
    (directory / GENERATION_NAME).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def _manifest(
    parts: _Parts, directory: Path, name: str, begin: tuple[int, ...], found: Found, figures: QualityFigures
) -> Manifest:
    checkpoint, spec = parts.checkpoint, parts.spec
    control_ids = parts.tokenizer.control_ids
    conversation = [Message("system", "a"), Message("user", "b"), Message("assistant", "c"), Message("user", "d")]
    return Manifest(
        name=name,
        architecture=spec.architecture,
        context_length=spec.max_context_length,
        vocab_size=spec.vocab_size,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.padded_head_dim,
        parameter_count=sum(math.prod(checkpoint.shape(tensor)) for tensor in checkpoint.tensor_names),
        quantization="int8",
        license=checkpoint.license or "unknown",
        source=checkpoint.source,
        eos_ids=tuple(checkpoint.config["eos_token_id"]),
        control_ids=tuple(sorted(control_ids)),
        role_markers=tuple(sorted(control_ids.intersection(parts.tokenizer.encode_chat(conversation)))),
        preset_tokens=begin,
        bos_token=checkpoint.bos_token,
        eos_token=checkpoint.eos_token,
        recipe=found.to_json(),
        quality=asdict(figures) | {"text": "hearthd evaluation set"},
        created_with={package: metadata.version(package) for package in _PACKAGES},
        files={path.name: file_entry(path) for path in sorted(directory.iterdir())},
    )
