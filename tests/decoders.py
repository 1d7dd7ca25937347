"""Tiny real decoders for tests of graphs and runners: a random checkpoint, its graph by any recipe, and a runner."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bundles import seal
from checkpoints import tiny_models, write_huggingface
from hearthd.build.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.build.decoder.attention import KVScales
from hearthd.build.decoder.graph import GraphOptions, write_graph
from hearthd.build.decoder.recipe import Recipe
from hearthd.build.decoder.weights import DecoderWeights
from hearthd.bundles.bundle import Bundle
from hearthd.runtime.runner import DecoderShape, OnnxRunner

CONTEXT = 96


def tiny_checkpoint(directory: Path, name: str = "smollm2", **changes: object) -> Checkpoint:
    """Write a tiny checkpoint and open it; `changes` go into its configuration."""
    path = directory / name
    model = tiny_models()[name]
    write_huggingface(path, replace(model, config=model.config | changes))
    return open_checkpoint(path)


def tiny_runner(
    directory: Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    num_slots: int = 4,
    kv_scales: KVScales | None = None,
    kv_bytes: int = 0,
) -> OnnxRunner:
    """Write the checkpoint's graph by a recipe and load it; with kv_scales its cache is int8."""
    spec = DecoderSpec.from_config(checkpoint.config)
    directory.mkdir(parents=True)
    weights = DecoderWeights(checkpoint, spec, rotated=recipe.rotated)
    options = GraphOptions(CONTEXT, int8_embedding=bool(recipe.matmuls))
    path = write_graph(directory, spec, weights, recipe, options, kv_scales=kv_scales)
    shape = DecoderShape(spec.num_layers, spec.num_kv_heads, spec.padded_head_dim, spec.vocab_size)
    return OnnxRunner(path, shape, num_slots=num_slots, context_length=CONTEXT, num_threads=1, kv_bytes=kv_bytes)


def scales_of(runner: OnnxRunner, token_ids: Sequence[int]) -> KVScales:
    """Return the scales that hold the KV of these tokens, with some room. runner: with a float32 cache."""
    runner.forward(np.asarray([token_ids], np.int64), 0, np.zeros(1, np.int32))
    return KVScales.from_peaks(1.5 * np.abs(runner.read_slot(0, len(token_ids))).max(axis=3))


def tiny_bundle(directory: Path, checkpoint: Checkpoint, *, context_length: int = CONTEXT) -> Bundle:
    """Write the checkpoint's float32 graph as a bundle that can be served; no calibration, so it is there at once."""
    spec = DecoderSpec.from_config(checkpoint.config)
    directory.mkdir(parents=True)
    weights = DecoderWeights(checkpoint, spec, rotated=False)
    write_graph(directory, spec, weights, Recipe.reference(), GraphOptions(context_length))
    (directory / "tokenizer.json").write_text(checkpoint.tokenizer_json)
    (directory / "chat_template.jinja").write_text(checkpoint.chat_template)
    (directory / "generation.json").write_text("{}")
    seal(
        directory,
        name=directory.name,
        architecture=spec.architecture,
        context_length=context_length,
        vocab_size=spec.vocab_size,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.padded_head_dim,
        eos_ids=tuple(checkpoint.config["eos_token_id"]),
        preset_tokens=(),
    )
    return Bundle.open(directory)
