"""The fused decoder graph: one layout for every architecture, every recipe and every board.

Inputs: `input_ids` int64 (B, S); `num_logits` int64 (1,), N of 1 to S; `seqlens_k` int32 (B,), each row's last
position; `total_sequence_length` int32 (1,), the longest row with this run's tokens; for each layer n `past_key.n` and
`past_value.n` float32 (B, kv_heads, max_len, padded_head_dim). Outputs: `logits` float32 (B, N, vocab_size) of the last
N positions; `present_key.n` and `present_value.n`, bound by the caller to the same buffers as the past, so that nothing
is copied or joined.

With an int8 cache, which every bundle has, there are also `is_prompt` bool (), and for each layer n `past_key_int8.n`,
`past_value_int8.n` int8 of the same shape, and `present_*_int8.n`. If `is_prompt` is true, B is 1, the float32 buffers
hold the row's int8 numbers as float32 and get those of this run's tokens, which `present_*_int8.n` gives by itself,
(1, kv_heads, S, padded_head_dim). If it is false, the int8 buffers are past and present; S tokens of a row then get the
bits that S runs of one would give them. Whatever is not used may be bound to arrays without positions. `attention` says
why.

Bundles of manifest schema 2 have no `num_logits`: their `logits` are (B, vocab_size), of the last position.

Knows ONNX and the contrib operators of ONNX Runtime; no files but those it writes, no calibration. Called by
`builder`, `calibrate` and `quality`, which ask for further outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.build.decoder.attention import KVScales, add_attention, add_first_position
from hearthd.build.decoder.external_data import ExternalData
from hearthd.build.decoder.linear import add_linear, switch_names
from hearthd.build.decoder.nodes import MICROSOFT, Nodes
from hearthd.build.decoder.recipe import MatMulForm, MatMulName, Recipe
from hearthd.build.decoder.rope import rope_tables
from hearthd.build.decoder.rounding import SMALLEST_PEAK, Nearest, Rounding
from hearthd.build.decoder.weights import DecoderWeights, LayerWeights, Linear

__all__ = ["DATA_FILE", "MODEL_FILE", "GraphOptions", "write_graph"]

MODEL_FILE = "model.onnx"
DATA_FILE = "model.data"
# Of a slice: up to the end.
_END = 2**63 - 1


@dataclass(frozen=True, slots=True)
class GraphOptions:
    """context_length: positions in the rope tables. capture: matmuls' inputs are outputs too, `capture.<matmul>`.

    int8_embedding: rows as int8 with a scale each, which is what a bundle has; False keeps float32, which is the
    reference.

    A matmul of the form SWITCHED adds two inputs, `linear.switch_names`.
    """

    context_length: int
    capture: bool = False
    int8_embedding: bool = False


def write_graph(
    directory: Path,
    spec: DecoderSpec,
    weights: DecoderWeights,
    recipe: Recipe,
    options: GraphOptions,
    rounding: Rounding | None = None,
    kv_scales: KVScales | None = None,
) -> Path:
    """Write `model.onnx` and `model.data` into the directory; returns the model's path.

    rounding: how weights of the int8 forms are rounded, to the nearest if nothing is said. kv_scales: of an int8 cache;
    None for a float32 one.
    """
    with ExternalData(directory / DATA_FILE) as data:
        graph = _GraphWriter(data, spec, recipe, options, rounding or Nearest(), kv_scales)
        graph.write(weights)
    model = helper.make_model(
        graph.finish(),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)],
        # The oldest that has opset 21: older tools can read the file.
        ir_version=10,
        producer_name="hearthd",
    )
    path = directory / MODEL_FILE
    path.write_bytes(model.SerializeToString())
    return path


class _GraphWriter:
    """Adds nodes in the order of the data's way; each method returns the name of its result."""

    def __init__(
        self,
        data: ExternalData,
        spec: DecoderSpec,
        recipe: Recipe,
        options: GraphOptions,
        rounding: Rounding,
        kv_scales: KVScales | None,
    ) -> None:
        self._data = data
        self._nodes = Nodes(data)
        self._spec = spec
        self._recipe = recipe
        self._options = options
        self._rounding = rounding
        self._kv_scales = kv_scales
        self._captured: list[str] = []
        self._switches: list[str] = []

    def write(self, weights: DecoderWeights) -> None:
        spec = self._spec
        for rope in spec.ropes:
            cos, sin = rope_tables(rope, self._options.context_length, spec.padded_head_dim // 2)
            self._nodes.tensor(f"{rope.name}.cos", cos)
            self._nodes.tensor(f"{rope.name}.sin", sin)
        if self._kv_scales is not None:
            add_first_position(self._nodes)
        self._nodes.node("Neg", ["num_logits"], "first_with_logits")
        hidden = self._embed(weights.embedding())
        branch = ""
        for index in range(spec.num_layers):
            hidden, branch = self._layer(index, weights.layer(index), hidden, branch)
        norm, head = weights.head()
        normed, _ = self._residual_norm("norm", hidden, branch, norm)
        self._linear(MatMulName("lm_head"), normed, head, output="logits")

    def finish(self) -> onnx.GraphProto:
        spec = self._spec
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "S"]),
            helper.make_tensor_value_info("num_logits", TensorProto.INT64, [1]),
            helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["B"]),
            helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, [1]),
        ]
        inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in self._switches]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "N", spec.vocab_size])]
        caches = [("", TensorProto.FLOAT)]
        if self._kv_scales is not None:
            inputs.append(helper.make_tensor_value_info("is_prompt", TensorProto.BOOL, []))
            caches.append(("_int8", TensorProto.INT8))
        for suffix, kind in caches:
            for index in range(spec.num_layers):
                for part in ("key", "value"):
                    for values, time in ((inputs, "past"), (outputs, "present")):
                        name = f"{time}_{part}{suffix}"
                        # Names of their own, since no two of these sizes need be equal.
                        places = f"positions_of_{name}"
                        shape = (f"rows_of_{name}", spec.num_kv_heads, places, spec.padded_head_dim)
                        values.append(helper.make_tensor_value_info(f"{name}.{index}", kind, shape))
        outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self._captured]
        return helper.make_graph(self._nodes.protos, "decoder", inputs, outputs, initializer=self._data.initializers)

    def _embed(self, embedding: NDArray[np.float32]) -> str:
        nodes = self._nodes
        if not self._options.int8_embedding:
            return nodes.node("Gather", [nodes.tensor("embed.weight", embedding), "input_ids"], "embed")
        # One scale a row: a row is read as a whole, and only rows in use ever come into memory.
        scales = np.maximum(np.abs(embedding).max(axis=1, keepdims=True) / 127, SMALLEST_PEAK).astype(np.float32)
        integers = nodes.tensor("embed.weight", np.rint(embedding / scales).astype(np.int8))
        gathered = nodes.node("Gather", [integers, "input_ids"], "embed.int8")
        rows = nodes.node("Cast", [gathered], "embed.rows", to=TensorProto.FLOAT)
        row_scales = nodes.node("Gather", [nodes.tensor("embed.scale", scales), "input_ids"], "embed.row_scale")
        return nodes.node("Mul", [rows, row_scales], "embed")

    def _layer(self, index: int, weights: LayerWeights, hidden: str, branch: str) -> tuple[str, str]:
        """Add a layer; returns the residual stream and the branch that the next norm adds to it."""
        path = f"layers.{index}"
        normed, hidden = self._residual_norm(f"{path}.input_norm", hidden, branch, weights.input_norm)
        qkv = self._linear(MatMulName("qkv", index), normed, weights.qkv)
        attended = add_attention(self._nodes, self._spec, index, qkv, weights, self._kv_scales)
        if index == self._spec.num_layers - 1:
            # Nothing after the last attention mixes positions, and only the last ones' logits are wanted.
            attended = self._with_logits(attended, f"{path}.attention.with_logits")
            hidden = self._with_logits(hidden, f"{path}.hidden.with_logits")
        branch = self._linear(MatMulName("o", index), attended, weights.o)
        branch = self._branch_norm(f"{path}.attention_branch_norm", branch, weights.attention_branch_norm)
        normed, hidden = self._residual_norm(f"{path}.post_attention_norm", hidden, branch, weights.post_attention_norm)
        gate_up = self._linear(MatMulName("gate_up", index), normed, weights.gate_up)
        gate, up = f"{path}.gate", f"{path}.up"
        self._nodes.nodes("Split", [gate_up], [gate, up], axis=-1, num_outputs=2)
        inner = self._nodes.node("Mul", [self._activated(path, gate), up], f"{path}.inner")
        branch = self._linear(MatMulName("down", index), inner, weights.down)
        return hidden, self._branch_norm(f"{path}.mlp_branch_norm", branch, weights.mlp_branch_norm)

    def _activated(self, path: str, gate: str) -> str:
        if self._spec.activation == "gelu_pytorch_tanh":
            return self._nodes.node("Gelu", [gate], f"{path}.gelu", approximate="tanh")
        # x * sigmoid(x): QuickGelu with alpha 1 is SiLU in one kernel.
        return self._nodes.node("QuickGelu", [gate], f"{path}.silu", domain=MICROSOFT, alpha=1.0)

    def _branch_norm(self, name: str, branch: str, weight: NDArray[np.float32] | None) -> str:
        """Normalise what is about to be added to the residual stream, where an architecture does that."""
        return branch if weight is None else self._norm(name, branch, weight)

    def _residual_norm(self, name: str, hidden: str, branch: str, weight: NDArray[np.float32]) -> tuple[str, str]:
        """Add the branch to the residual stream and normalise; returns the normed and the new stream."""
        if not branch:
            return self._norm(name, hidden, weight), hidden
        total = f"{name}.residual"
        gamma = self._nodes.tensor(f"{name}.weight", weight)
        self._nodes.nodes(
            "SkipSimplifiedLayerNormalization",
            [hidden, branch, gamma],
            [name, "", "", total],
            domain=MICROSOFT,
            epsilon=self._spec.rms_norm_eps,
        )
        return name, total

    def _norm(self, name: str, value: str, weight: NDArray[np.float32]) -> str:
        gamma = self._nodes.tensor(f"{name}.weight", weight)
        epsilon = self._spec.rms_norm_eps
        return self._nodes.node("SimplifiedLayerNormalization", [value, gamma], name, axis=-1, epsilon=epsilon)

    def _with_logits(self, value: str, name: str) -> str:
        """(B, S, features) -> (B, N, features)."""
        inputs = [value, "first_with_logits", self._nodes.integer("end", [_END]), self._nodes.integer("axis_1", [1])]
        return self._nodes.node("Slice", inputs, name)

    def _linear(self, matmul: MatMulName, value: str, linear: Linear, output: str | None = None) -> str:
        name = str(matmul)
        if self._options.capture:
            self._captured.append(self._nodes.node("Identity", [value], f"capture.{name}"))
        recipe = self._recipe.of(matmul)
        if recipe.form is MatMulForm.SWITCHED:
            self._switches += switch_names(matmul)
        return add_linear(self._nodes, name, value, linear, recipe, self._rounding, output or name)
