"""The graph's recipes on tiny decoders: rotation changes nothing, and each int8 form is as exact as it says."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from checkpoints import tiny_models, write_huggingface
from decoders import CONTEXT, tiny_checkpoint, tiny_runner
from hearthd.build.checkpoints.checkpoint import open_checkpoint
from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.build.decoder.external_data import ExternalData
from hearthd.build.decoder.graph import GraphOptions, write_graph
from hearthd.build.decoder.linear import SECOND_TERM, add_linear, switch_names
from hearthd.build.decoder.matmuls import matmul_names
from hearthd.build.decoder.nodes import Nodes
from hearthd.build.decoder.recipe import MatMulForm, MatMulName, MatMulRecipe, Recipe
from hearthd.build.decoder.rounding import Nearest
from hearthd.build.decoder.weights import DecoderWeights, Linear
from hearthd.build.quantization.documents import TokenDocument
from hearthd.build.quantization.search import find_recipe
from hearthd.build.quantization.sensitivity import measure_sensitivity
from hearthd.build.quantization.session import GraphSession
from hearthd.runtime.runner import OnnxRunner

IDS = [5, 9, 200, 31, 77, 12, 40, 41, 42, 250, 3, 17, 90, 91, 92, 93]


def logits_of_every_token(runner: OnnxRunner) -> NDArray[np.float32]:
    """Decode IDS one by one: float32 (tokens, vocab_size)."""
    return np.concatenate(
        [runner.forward(np.asarray([[token]]), 0, np.asarray([at], np.int32)).copy() for at, token in enumerate(IDS)]
    )


@pytest.mark.parametrize("name", sorted(tiny_models()))
def test_a_rotated_decoder_gives_the_same_logits(tmp_path: Path, name: str) -> None:
    checkpoint = tiny_checkpoint(tmp_path, name)
    if not DecoderSpec.from_config(checkpoint.config).rotatable:
        with pytest.raises(AssertionError, match="cannot be rotated"):
            tiny_runner(tmp_path / "rotated", checkpoint, Recipe({}, rotated=True))
        return
    plain = logits_of_every_token(tiny_runner(tmp_path / "plain", checkpoint, Recipe.reference()))
    rotated = logits_of_every_token(tiny_runner(tmp_path / "rotated", checkpoint, Recipe({}, rotated=True)))
    np.testing.assert_allclose(rotated, plain, rtol=1e-3, atol=1e-3)


def error_of(tmp_path: Path, form: MatMulForm) -> float:
    """Mean distance from the float32 logits, in shares of their spread, with every `down` in a form and float else."""
    checkpoint = tiny_checkpoint(tmp_path)
    spec = DecoderSpec.from_config(checkpoint.config)
    expected = logits_of_every_token(tiny_runner(tmp_path / "float", checkpoint, Recipe({}, rotated=True)))
    recipe = Recipe({n: MatMulRecipe(form) for n in matmul_names(spec) if n.kind == "down"}, rotated=True)
    found = logits_of_every_token(tiny_runner(tmp_path / form.value, checkpoint, recipe))
    return float(np.abs(found - expected).mean() / expected.std())


def test_two_terms_lose_less_than_one(tmp_path: Path) -> None:
    one = error_of(tmp_path / "one", MatMulForm.PER_ROW)
    two = error_of(tmp_path / "two", MatMulForm.PER_ROW_TWO_TERMS)
    # What is left of two terms is the weights' own rounding.
    assert two < 0.8 * one < 0.02


def random_documents(spec: DecoderSpec) -> list[TokenDocument]:
    random = np.random.default_rng(3)
    kinds = ("prose", "code") * 4
    return [TokenDocument(kind, tuple(map(int, random.integers(0, spec.vocab_size, 60)))) for kind in kinds]


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_a_recipe_that_was_found_is_close_to_float(tmp_path: Path, name: str) -> None:
    checkpoint = tiny_checkpoint(tmp_path, name)
    spec = DecoderSpec.from_config(checkpoint.config)
    shares: dict[str, list[float]] = {}
    (tmp_path / "scratch").mkdir()
    found = find_recipe(
        checkpoint,
        spec,
        random_documents(spec),
        scratch=tmp_path / "scratch",
        preset=None,
        num_threads=1,
        report=lambda stage, share: shares.setdefault(stage, []).append(share),
    )
    assert list(shares) == ["calibration", "rounding", "sensitivity"]
    assert all(stage == sorted(stage) for stage in shares.values())
    assert shares["calibration"][-1] == shares["sensitivity"][-1] == 1
    assert set(found.recipe.matmuls) == set(matmul_names(spec))
    assert found.recipe.rotated == spec.rotatable
    expected = logits_of_every_token(tiny_runner(tmp_path / "float", checkpoint, Recipe.reference()))
    logits = logits_of_every_token(tiny_runner(tmp_path / "int8", checkpoint, found.recipe))
    # Random layers amplify errors more than trained ones; a wrong scale anywhere gives 0.5 and more.
    assert np.abs(logits - expected).mean() < 0.1 * expected.std()


def test_switches_make_each_form(tmp_path: Path) -> None:
    """The graph that sensitivities are measured with computes what the forms' own graphs compute."""
    checkpoint = tiny_checkpoint(tmp_path)
    spec = DecoderSpec.from_config(checkpoint.config)
    names = matmul_names(spec)
    step = 0.05

    def session(form: MatMulForm) -> GraphSession:
        directory = tmp_path / form.value
        directory.mkdir()
        recipe = Recipe({name: MatMulRecipe(form, step) for name in names}, rotated=True)
        options = GraphOptions(CONTEXT, int8_embedding=True)
        path = write_graph(directory, spec, DecoderWeights(checkpoint, spec, rotated=True), recipe, options)
        return GraphSession(path.read_bytes(), spec, data_directory=directory, context_length=CONTEXT, num_threads=1)

    switched = session(MatMulForm.SWITCHED)
    for form, fixed, second_term in (
        (MatMulForm.STATIC, step, 0.0),
        (MatMulForm.PER_ROW, 0.0, 0.0),
        (MatMulForm.PER_ROW_TWO_TERMS, 0.0, SECOND_TERM),
    ):
        inputs = {}
        for name in names:
            values = zip(switch_names(name), (fixed, second_term), strict=True)
            inputs |= {switch: np.asarray(value, np.float32) for switch, value in values}
        expected = session(form).run_once(IDS, start=0, inputs={})
        found = switched.run_once(IDS, start=0, inputs=inputs)
        # Up to roundings that fall to the other side: products of float32 in another order.
        assert np.abs(found - expected).mean() < 0.02 * expected.std()


def test_the_matmul_with_an_outlier_is_the_sensitive_one(tmp_path: Path) -> None:
    """One feature of a value projection a hundred times larger, and read with a hundredth: the decoder is the same."""
    model = tiny_models()["smollm2"]
    weights = model.weights()
    weights["model.layers.1.self_attn.v_proj.weight"][5] *= 100
    # Two query heads of 16 features share the first KV head.
    weights["model.layers.1.self_attn.o_proj.weight"][:, [5, 16 + 5]] /= 100
    write_huggingface(tmp_path / "outlier", model, weights=weights)
    checkpoint = open_checkpoint(tmp_path / "outlier")
    spec = DecoderSpec.from_config(checkpoint.config)
    (tmp_path / "graph").mkdir()
    found = measure_sensitivity(
        checkpoint,
        spec,
        random_documents(spec),
        directory=tmp_path / "graph",
        rounding=Nearest(),
        preset=None,
        num_threads=1,
        report=lambda share: None,
    )
    assert set(found) == set(matmul_names(spec))
    assert all(loss >= 0 for loss in found.values())
    assert max(found, key=found.__getitem__) == MatMulName("o", 1)


def test_no_matmul_is_left_in_float(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    spec = DecoderSpec.from_config(checkpoint.config)
    recipe = Recipe({n: MatMulRecipe(MatMulForm.PER_ROW) for n in matmul_names(spec)}, rotated=True)
    tiny_runner(tmp_path / "graph", checkpoint, recipe)
    model = onnx.load(str(tmp_path / "graph" / "model.onnx"), load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 4 * spec.num_layers + 1
    assert not {"MatMul", "Gemm", "DynamicQuantizeMatMul", "Concat"} & set(kinds)


@pytest.mark.parametrize("form", [MatMulForm.PER_ROW, MatMulForm.PER_ROW_TWO_TERMS])
def test_a_row_of_zeros_gives_zeros_and_leaves_its_neighbours_alone(tmp_path: Path, form: MatMulForm) -> None:
    """A row's own scale is then 0, and what it is divided by too."""
    data = ExternalData(tmp_path / "data")
    nodes = Nodes(data)
    random = np.random.default_rng(5)
    values = random.standard_normal((1, 3, 64)).astype(np.float32)
    values[0, 1] = 0
    with data:
        linear = Linear(random.standard_normal((64, 32)).astype(np.float32), None)
        add_linear(nodes, "matmul", "x", linear, MatMulRecipe(form), Nearest(), "y")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes.protos,
        "matmul",
        [value("x", onnx.TensorProto.FLOAT, [1, "S", 64])],
        [value("y", onnx.TensorProto.FLOAT, None)],
        data.initializers,
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    (found,) = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": values})
    assert not found[0, 1].any()
    expected = values[0, ::2] @ linear.weight
    assert np.abs(found[0, ::2] - expected).mean() < 0.02 * expected.std()
