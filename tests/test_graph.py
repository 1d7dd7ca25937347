"""The graph's recipes on tiny decoders: rotation changes nothing, and each int8 form is as exact as it says."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from checkpoints import tiny_models
from decoders import tiny_checkpoint, tiny_runner
from hearthd.build.architecture import DecoderSpec
from hearthd.build.calibrate import calibrate, matmul_names
from hearthd.build.documents import TokenDocument
from hearthd.build.recipe import MatMulForm, MatMulName, MatMulRecipe, Recipe
from hearthd.runner import OnnxRunner

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


def test_a_calibrated_decoder_is_close_to_float(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "qwen2")
    spec = DecoderSpec.from_config(checkpoint.config)
    random = np.random.default_rng(3)
    documents = [
        TokenDocument("prose", tuple(int(each) for each in random.integers(0, spec.vocab_size, 60))) for _ in range(8)
    ]
    shares: list[float] = []
    (tmp_path / "calibration").mkdir()
    recipe = calibrate(
        checkpoint,
        spec,
        documents,
        directory=tmp_path / "calibration",
        preset=None,
        num_threads=1,
        report=shares.append,
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert set(recipe.matmuls) == set(matmul_names(spec))
    assert recipe.of(MatMulName("qkv", 0)).form is MatMulForm.STATIC
    expected = logits_of_every_token(tiny_runner(tmp_path / "float", checkpoint, Recipe.reference()))
    found = logits_of_every_token(tiny_runner(tmp_path / "int8", checkpoint, recipe))
    # Random layers amplify errors more than trained ones; a wrong scale anywhere gives 0.5 and more.
    assert np.abs(found - expected).mean() < 0.1 * expected.std()


def test_no_matmul_is_left_in_float(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    spec = DecoderSpec.from_config(checkpoint.config)
    recipe = Recipe({n: MatMulRecipe(MatMulForm.PER_ROW) for n in matmul_names(spec)}, rotated=True)
    tiny_runner(tmp_path / "graph", checkpoint, recipe)
    model = onnx.load(str(tmp_path / "graph" / "model.onnx"), load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 4 * spec.num_layers + 1
    assert not {"MatMul", "Gemm", "DynamicQuantizeMatMul", "Concat"} & set(kinds)
