"""Small bundles for tests of bundle, store and cli: real files and a real ONNX graph, no language model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from hearthd.bundles.bundle import MANIFEST_NAME, Manifest, file_entry

TINY_MANIFEST = Manifest(
    name="tiny",
    architecture="LlamaForCausalLM",
    context_length=64,
    vocab_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    parameter_count=1234,
    quantization="int8",
    license="Apache-2.0",
    source="made by a test",
    eos_ids=(2,),
    control_ids=(0, 1, 2),
    preset_tokens=(1,),
    recipe={"layers": [{"down": "per_row"}]},
    quality={"kl_mean": 0.0125, "tokens": 100, "text": "held"},
    created_with={"hearthd": "0.1.0"},
    files={
        name: file_entry(Path("/dev/null"))
        for name in ("model.onnx", "tokenizer.json", "chat_template.jinja", "generation.json", "preset.npy")
    },
)


def tiny_model(external: str = "model.data") -> bytes:
    """An ONNX model that adds 16 floats which stand in the file `external`."""
    tensor = onnx.TensorProto(
        name="weights", dims=(16,), data_type=onnx.TensorProto.FLOAT, data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in (("location", external), ("offset", "0"), ("length", "64")):
        tensor.external_data.add(key=key, value=value)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "weights"], ["y"])],
        "tiny",
        [value("x", onnx.TensorProto.FLOAT, [16])],
        [value("y", onnx.TensorProto.FLOAT, [16])],
        [tensor],
    )
    return bytes(onnx.helper.make_model(graph).SerializeToString())


def write_bundle(path: Path, *, seed: int = 0, external: str = "model.data", **changes: Any) -> Manifest:
    """Write a bundle that opens. `changes` go into the manifest; `seed` makes the weights differ."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "model.onnx").write_bytes(tiny_model(external))
    weights = np.random.default_rng(seed).standard_normal(16).astype(np.float32)
    (path / "model.data").write_bytes(weights.tobytes())
    np.save(path / "preset.npy", np.zeros((2, 2, 2, 1, 16), np.int8))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "generation.json").write_text(json.dumps({"temperature": 0.2, "top_p": 0.9}))
    return seal(path, **changes)


def seal(path: Path, **changes: Any) -> Manifest:
    """Write the manifest for the files that are there."""
    files = {each.name: file_entry(each) for each in sorted(path.iterdir()) if each.name != MANIFEST_NAME}
    manifest = replace(TINY_MANIFEST, **({"files": files} | changes))
    (path / MANIFEST_NAME).write_text(manifest.to_json())
    return manifest
