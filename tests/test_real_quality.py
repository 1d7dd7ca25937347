"""The default model's int8: as faithful as promised on every kind of text, and no matmul left in float."""

import json
from pathlib import Path

import onnx
import pytest

from hearthd.__main__ import main
from hearthd.build.decoder.recipe import MatMulForm
from hearthd.build.quantization.corpus import KINDS
from hearthd.bundles.bundle import Bundle

pytestmark = pytest.mark.model

# Prose that was written for this test and is in neither of the shipped sets.
UNSEEN = """
The ferry to the outer islands leaves twice a day in winter, once before dawn and once when the post has come.
Its captain, a woman of few words, keeps a list of everyone who has ever asked to be let off at the lighthouse,
and there are eleven names on it. The last of them is a boy who wanted to see how the lamp turned; he stayed for
three weeks, learned to splice rope, and went home with a bag of limpet shells. When the wind is from the north
the crossing takes forty minutes longer and the tea is served in mugs that are only half full, so that nothing
is spilled.

Pi boards are cheap, and yet most of them end in a drawer. To make one useful, give it a single task that
somebody in the house would miss: the time of the next bus, the temperature in the greenhouse, or a voice that
answers questions about the washing machine's manual. Then write down how it was set up, because in two years
nobody will remember, least of all you.
"""


def test_figures_of_the_build_reach_the_targets_on_every_kind_of_text(default_bundle: Bundle) -> None:
    quality = default_bundle.manifest.quality
    assert set(quality["kinds"]) == set(KINDS)
    for kind, figures in {"all": quality, **quality["kinds"]}.items():
        assert figures["kl_mean"] <= 0.010, kind
        assert figures["top1_agreement"] >= 0.94, kind
        # Of a kind's 990 tokens the standard error is 0.3 %: another machine's rounding must not fail the test.
        limit = 1.01 if kind == "all" else 1.02
        assert figures["perplexity_int8"] <= limit * figures["perplexity_fp32"], kind


def test_verify_reaches_the_targets_on_text_that_nobody_has_seen(
    default_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "unseen.txt"
    text.write_text(UNSEEN)
    name, models = default_bundle.manifest.name, default_bundle.path.parent
    assert main(["model", "verify", name, "--models", str(models), "--text", str(text), "--json", "--quiet"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokens"] > 200
    assert figures["kl_mean"] <= 0.010
    # Of so short a text one token more or less is 0.5 %.
    assert figures["top1_agreement"] >= 0.93
    assert figures["perplexity_int8"] <= 1.015 * figures["perplexity_fp32"]


def test_every_matmul_runs_in_the_form_that_the_recipe_names_and_none_in_float(default_bundle: Bundle) -> None:
    model = onnx.load(str(default_bundle.model_path), load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    matmuls = default_bundle.manifest.recipe["matmuls"]
    assert len(matmuls) == 4 * default_bundle.manifest.num_layers + 1
    assert kinds.count("MatMulIntegerToFloat") == len(matmuls)
    assert not {"MatMul", "Gemm", "MatMulNBits", "DynamicQuantizeMatMul"} & set(kinds)
    by_row = [name for name, matmul in matmuls.items() if matmul["form"] != MatMulForm.STATIC.value]
    two_terms = [name for name, matmul in matmuls.items() if matmul["form"] == MatMulForm.PER_ROW_TWO_TERMS.value]
    assert kinds.count("ReduceMax") == len(by_row)
    assert kinds.count("Round") == len(two_terms)
    assert 0 < len(two_terms) < len(matmuls), "the search found every matmul alike"
