"""Graphs of bundles of manifest schema 2, without `num_logits`: served bit for bit as today's, judged, not drafted."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from decoders import CONTEXT, scales_of, tiny_checkpoint, tiny_runner
from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.build.decoder.matmuls import matmul_names
from hearthd.build.decoder.recipe import MatMulForm, MatMulRecipe, Recipe
from hearthd.build.quantization.older_graph import read_graph
from hearthd.runtime.runner import DecoderShape, OnnxRunner

IDS = [5, 9, 200, 31, 77, 12, 40, 41, 42, 250, 3, 17, 90, 91, 92, 93]


def make_older(directory: Path) -> None:
    """Change today's graph to what the version before wrote: nodes that pick the last position."""
    path = directory / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    graph.initializer.append(helper.make_tensor("last_position", onnx.TensorProto.INT64, [], [-1]))
    nodes = []
    for node in graph.node:
        if node.output[0].endswith(".with_logits"):
            name = node.output[0].replace(".with_logits", ".last_position")
            nodes.append(helper.make_node("Gather", [node.input[0], "last_position"], [name], axis=1))
        elif node.op_type != "Neg":
            for index, each in enumerate(node.input):
                node.input[index] = each.replace(".with_logits", ".last_position")
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.input.remove(next(value for value in graph.input if value.name == "num_logits"))
    logits = next(value for value in graph.output if value.name == "logits")
    del logits.type.tensor_type.shape.dim[1]
    path.write_bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> tuple[OnnxRunner, OnnxRunner, OnnxRunner]:
    """Today's graph, an older one, and that one as it is judged; with int8 weights and an int8 cache."""
    directory = tmp_path_factory.mktemp("older")
    checkpoint = tiny_checkpoint(directory)
    spec = DecoderSpec.from_config(checkpoint.config)
    forms = (MatMulForm.PER_ROW, MatMulForm.PER_ROW_TWO_TERMS)
    recipe = Recipe(
        {name: MatMulRecipe(forms[index % 2]) for index, name in enumerate(matmul_names(spec))}, rotated=True
    )
    scales = scales_of(tiny_runner(directory / "plain", checkpoint, Recipe.reference()), IDS)
    today = tiny_runner(directory / "today", checkpoint, recipe, kv_scales=scales)
    for name in ("older", "judged"):
        shutil.copytree(directory / "today", directory / name)
        make_older(directory / name)
    (directory / "judged/model.onnx").write_bytes(read_graph(directory / "older/model.onnx"))
    shape = DecoderShape(spec.num_layers, spec.num_kv_heads, spec.padded_head_dim, spec.vocab_size)
    older, judged = (
        OnnxRunner(directory / name / "model.onnx", shape, num_slots=4, context_length=CONTEXT, num_threads=1)
        for name in ("older", "judged")
    )
    return today, older, judged


def test_an_older_graph_is_served_bit_for_bit_as_todays(runners: tuple[OnnxRunner, OnnxRunner, OnnxRunner]) -> None:
    found = []
    for runner in runners:
        logits = [runner.forward(np.asarray([IDS]), slot, np.zeros(1, np.int32)).copy() for slot in range(3)]
        steps = range(len(IDS), len(IDS) + 3)
        logits += [runner.forward(np.asarray([[at]] * 3), 0, np.full(3, at, np.int32)).copy() for at in steps]
        assert [each.shape for each in logits] == [(1, runner.vocab_size)] * 3 + [(3, runner.vocab_size)] * 3
        found.append((np.concatenate(logits), runner.read_slot(1, len(IDS) + 3)))
    for all_logits, kv in found[1:]:
        np.testing.assert_array_equal(all_logits, found[0][0])
        np.testing.assert_array_equal(kv, found[0][1])


def test_an_older_graph_verifies_nothing(runners: tuple[OnnxRunner, OnnxRunner, OnnxRunner]) -> None:
    assert [runner.can_verify for runner in runners] == [True, False, True]


def test_todays_graph_is_judged_as_it_is(tmp_path: Path) -> None:
    tiny_runner(tmp_path / "graph", tiny_checkpoint(tmp_path), Recipe.reference())
    path = tmp_path / "graph/model.onnx"
    assert read_graph(path) == path.read_bytes()
