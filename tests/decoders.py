"""Tiny real decoders for tests of graphs and runners: a random checkpoint, its graph by any recipe, and a runner."""

from dataclasses import replace
from pathlib import Path

from checkpoints import tiny_models, write_huggingface
from hearthd.build.architecture import DecoderSpec
from hearthd.build.checkpoint import Checkpoint, open_checkpoint
from hearthd.build.graph import GraphOptions, write_graph
from hearthd.build.recipe import Recipe
from hearthd.build.weights import DecoderWeights
from hearthd.runner import DecoderShape, OnnxRunner

CONTEXT = 96


def tiny_checkpoint(directory: Path, name: str = "smollm2", **changes: object) -> Checkpoint:
    """Write a tiny checkpoint and open it; `changes` go into its configuration."""
    path = directory / name
    model = tiny_models()[name]
    write_huggingface(path, replace(model, config=model.config | changes))
    return open_checkpoint(path)


def tiny_runner(directory: Path, checkpoint: Checkpoint, recipe: Recipe, *, num_slots: int = 4) -> OnnxRunner:
    """Write the checkpoint's graph by a recipe and load it."""
    spec = DecoderSpec.from_config(checkpoint.config)
    directory.mkdir(parents=True)
    weights = DecoderWeights(checkpoint, spec, rotated=recipe.rotated)
    path = write_graph(directory, spec, weights, recipe, GraphOptions(CONTEXT, int8_embedding=bool(recipe.matmuls)))
    shape = DecoderShape(spec.num_layers, spec.num_kv_heads, spec.padded_head_dim, spec.vocab_size)
    return OnnxRunner(path, shape, num_slots=num_slots, context_length=CONTEXT, num_threads=1)
