"""The fused decoder graph: one layout for every architecture, every recipe and every board.

Inputs: `input_ids` int64 (B, S); `seqlens_k` int32 (B,), each row's last position; `total_sequence_length` int32
(1,), the longest row with this run's tokens; for each layer n `past_key.n` and `past_value.n` float32 (B, kv_heads,
max_len, padded_head_dim). Outputs: `logits` float32 (B, vocab_size) of the last position; `present_key.n` and
`present_value.n`, bound by the caller to the same buffers as the past, so that nothing is copied or joined.

Knows ONNX and the contrib operators of ONNX Runtime; no files but those it writes, no calibration. Called by
`builder`, `calibrate` and `quality`, which ask for further outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from hearthd.build.architecture import DecoderSpec, rope_tables
from hearthd.build.external_data import ExternalData
from hearthd.build.recipe import MatMulForm, MatMulName, Recipe
from hearthd.build.weights import DecoderWeights, LayerWeights, Linear

__all__ = ["DATA_FILE", "LAST_POSITION", "MODEL_FILE", "GraphOptions", "write_graph"]

MODEL_FILE = "model.onnx"
DATA_FILE = "model.data"
# How the results of the nodes end that keep the last position only; without them a graph gives every position's logits.
LAST_POSITION = ".last_position"

_MICROSOFT = "com.microsoft"
# A row of zeros must not divide by zero; any positive value gives zeros then.
_SMALLEST_PEAK = 1e-12


@dataclass(frozen=True, slots=True)
class GraphOptions:
    """context_length: positions in the rope tables. all_logits: `logits` float32 (B, S, vocab_size) for every position.

    capture: each matmul's input is an output too, named `capture.<matmul>`. int8_embedding: rows as int8 with a scale
    each, which is what a bundle has; False keeps float32, which is the reference.
    """

    context_length: int
    all_logits: bool = False
    capture: bool = False
    int8_embedding: bool = False


def write_graph(
    directory: Path, spec: DecoderSpec, weights: DecoderWeights, recipe: Recipe, options: GraphOptions
) -> Path:
    """Write `model.onnx` and `model.data` into the directory; returns the model's path."""
    with ExternalData(directory / DATA_FILE) as data:
        graph = _GraphWriter(data, spec, recipe, options)
        graph.write(weights)
    model = helper.make_model(
        graph.finish(),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(_MICROSOFT, 1)],
        # The oldest that has opset 21: older tools can read the file.
        ir_version=10,
        producer_name="hearthd",
    )
    path = directory / MODEL_FILE
    path.write_bytes(model.SerializeToString())
    return path


class _GraphWriter:
    """Adds nodes in the order of the data's way; each method returns the name of its result."""

    def __init__(self, data: ExternalData, spec: DecoderSpec, recipe: Recipe, options: GraphOptions) -> None:
        self._data = data
        self._spec = spec
        self._recipe = recipe
        self._options = options
        self._nodes: list[onnx.NodeProto] = []
        self._captured: list[str] = []

    def write(self, weights: DecoderWeights) -> None:
        spec = self._spec
        cos, sin = rope_tables(spec, self._options.context_length)
        self._data.add("rope.cos", cos)
        self._data.add("rope.sin", sin)
        hidden = self._embed(weights.embedding())
        branch = ""
        for index in range(spec.num_layers):
            hidden, branch = self._layer(index, weights.layer(index), hidden, branch)
        norm, head = weights.head()
        normed, _ = self._residual_norm("norm", hidden, branch, norm)
        self._linear(MatMulName("lm_head"), normed, head, output="logits")

    def finish(self) -> onnx.GraphProto:
        spec, options = self._spec, self._options
        cache: list[str | int | None] = ["B", spec.num_kv_heads, "max_len", spec.padded_head_dim]
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "S"]),
            helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["B"]),
            helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, [1]),
        ]
        shape: list[str | int | None] = ["B", "S", spec.vocab_size] if options.all_logits else ["B", spec.vocab_size]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)]
        for index in range(spec.num_layers):
            for part in ("key", "value"):
                inputs.append(helper.make_tensor_value_info(f"past_{part}.{index}", TensorProto.FLOAT, cache))
                outputs.append(helper.make_tensor_value_info(f"present_{part}.{index}", TensorProto.FLOAT, cache))
        outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self._captured]
        return helper.make_graph(self._nodes, "decoder", inputs, outputs, initializer=self._data.initializers)

    def _embed(self, embedding: NDArray[np.float32]) -> str:
        if not self._options.int8_embedding:
            return self._node("Gather", [self._data.add("embed.weight", embedding), "input_ids"], "embed")
        # One scale a row: a row is read as a whole, and only rows in use ever come into memory.
        scales = np.maximum(np.abs(embedding).max(axis=1, keepdims=True) / 127, _SMALLEST_PEAK).astype(np.float32)
        integers = self._data.add("embed.weight", np.rint(embedding / scales).astype(np.int8))
        gathered = self._node("Gather", [integers, "input_ids"], "embed.int8")
        rows = self._node("Cast", [gathered], "embed.rows", to=TensorProto.FLOAT)
        row_scales = self._node("Gather", [self._data.add("embed.scale", scales), "input_ids"], "embed.row_scale")
        return self._node("Mul", [rows, row_scales], "embed")

    def _layer(self, index: int, weights: LayerWeights, hidden: str, branch: str) -> tuple[str, str]:
        """Add a layer; returns the residual stream and the branch that the next norm adds to it."""
        path = f"layers.{index}"
        normed, hidden = self._residual_norm(f"{path}.input_norm", hidden, branch, weights.input_norm)
        qkv = self._linear(MatMulName("qkv", index), normed, weights.qkv)
        attended = self._attention(index, qkv, weights)
        if index == self._spec.num_layers - 1 and not self._options.all_logits:
            # Nothing after the last attention mixes positions, and only the last one's logits are wanted.
            attended = self._last_position(attended, f"{path}.attention{LAST_POSITION}")
            hidden = self._last_position(hidden, f"{path}.hidden{LAST_POSITION}")
        branch = self._linear(MatMulName("o", index), attended, weights.o)
        normed, hidden = self._residual_norm(f"{path}.post_attention_norm", hidden, branch, weights.post_attention_norm)
        gate_up = self._linear(MatMulName("gate_up", index), normed, weights.gate_up)
        gate, up = f"{path}.gate", f"{path}.up"
        self._nodes.append(
            helper.make_node("Split", [gate_up], [gate, up], name=f"{path}.split", axis=-1, num_outputs=2)
        )
        # x * sigmoid(x): QuickGelu with alpha 1 is SiLU in one kernel.
        gate = self._node("QuickGelu", [gate], f"{path}.silu", domain=_MICROSOFT, alpha=1.0)
        inner = self._node("Mul", [gate, up], f"{path}.inner")
        return hidden, self._linear(MatMulName("down", index), inner, weights.down)

    def _attention(self, index: int, qkv: str, weights: LayerWeights) -> str:
        spec, path = self._spec, f"layers.{index}"
        query, key, value = qkv, "", ""
        if weights.q_norm is not None and weights.k_norm is not None:
            query, key, value = self._normed_heads(path, qkv, weights.q_norm, weights.k_norm)
        output = f"{path}.attention"
        self._nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [
                    *(query, key, value),
                    *(f"past_key.{index}", f"past_value.{index}", "seqlens_k", "total_sequence_length"),
                    *("rope.cos", "rope.sin"),
                ],
                [output, f"present_key.{index}", f"present_value.{index}"],
                name=output,
                domain=_MICROSOFT,
                num_heads=spec.num_heads,
                kv_num_heads=spec.num_kv_heads,
                do_rotary=1,
                rotary_interleaved=0,
                scale=spec.head_dim**-0.5,
            )
        )
        return output

    def _normed_heads(
        self, path: str, qkv: str, q_norm: NDArray[np.float32], k_norm: NDArray[np.float32]
    ) -> tuple[str, str, str]:
        """Divide q, k and v, and normalise each head of q and k.

        GroupQueryAttention lists inputs for these norms, but its CPU kernel refuses them (onnxruntime 1.31.1).
        """
        spec = self._spec
        sizes = self._integer("qkv_sizes", [spec.q_size, spec.kv_size, spec.kv_size])
        q, k, v = f"{path}.q", f"{path}.k", f"{path}.v"
        self._nodes.append(helper.make_node("Split", [qkv, sizes], [q, k, v], name=f"{path}.qkv_split", axis=-1))
        # Over the zeros of padded heads the mean square is smaller by this share; `weights` makes up for it in gamma.
        epsilon = spec.rms_norm_eps * spec.head_dim / spec.padded_head_dim
        normed = []
        for name, norm, size in ((q, q_norm, spec.q_size), (k, k_norm, spec.kv_size)):
            heads = self._integer(f"heads_of_{size}", [0, 0, size // spec.padded_head_dim, spec.padded_head_dim])
            split = self._node("Reshape", [name, heads], f"{name}.heads")
            gamma = self._data.add(f"{name}_norm.weight", norm)
            split = self._node("SimplifiedLayerNormalization", [split, gamma], f"{name}_norm", axis=-1, epsilon=epsilon)
            normed.append(
                self._node("Reshape", [split, self._integer(f"joined_{size}", [0, 0, size])], f"{name}.normed")
            )
        return normed[0], normed[1], v

    def _residual_norm(self, name: str, hidden: str, branch: str, weight: NDArray[np.float32]) -> tuple[str, str]:
        """Add the branch to the residual stream and normalise; returns the normed and the new stream."""
        epsilon = self._spec.rms_norm_eps
        gamma = self._data.add(f"{name}.weight", weight)
        if not branch:
            normed = self._node("SimplifiedLayerNormalization", [hidden, gamma], name, axis=-1, epsilon=epsilon)
            return normed, hidden
        total = f"{name}.residual"
        self._nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [hidden, branch, gamma],
                [name, "", "", total],
                name=name,
                domain=_MICROSOFT,
                epsilon=epsilon,
            )
        )
        return name, total

    def _linear(self, matmul: MatMulName, value: str, linear: Linear, output: str | None = None) -> str:
        """Add a matmul in the form that the recipe says; its input features are the last axis."""
        name = str(matmul)
        output = output or name
        if self._options.capture:
            self._captured.append(self._node("Identity", [value], f"capture.{name}"))
        recipe = self._recipe.of(matmul)
        bias = None if linear.bias is None else self._data.add(f"{name}.bias", linear.bias)
        if recipe.form is MatMulForm.FLOAT:
            weight = self._data.add(f"{name}.weight", linear.weight)
            product = self._node("MatMul", [value, weight], f"{name}.product" if bias else output)
            return self._node("Add", [product, bias], output) if bias else product

        weight_scales = np.maximum(np.abs(linear.weight).max(axis=0) / 127, _SMALLEST_PEAK).astype(np.float32)
        weight = self._data.add(f"{name}.weight", np.rint(linear.weight / weight_scales).astype(np.int8))
        if recipe.form is MatMulForm.STATIC:
            scale = self._data.add(f"{name}.input_scale", np.asarray(recipe.scale, np.float32))
            zero = self._data.add(f"{name}.input_zero_point", np.asarray(recipe.zero_point, np.uint8))
            quantized = self._node("QuantizeLinear", [value, scale, zero], f"{name}.quantized")
            scales = self._data.add(f"{name}.weight_scale", weight_scales)
            inputs = [quantized, weight, scale, scales, zero]
            inputs += ["", bias] if bias else []
            return self._node("MatMulIntegerToFloat", inputs, output, domain=_MICROSOFT)
        add_rows = self._per_row if recipe.form is MatMulForm.PER_ROW else self._per_row_two_terms
        product = add_rows(name, value, weight, weight_scales, f"{name}.product" if bias else output)
        return self._node("Add", [product, bias], output) if bias else product

    def _peak(self, name: str, value: str) -> str:
        """Return each row's largest magnitude, (..., 1)."""
        magnitude = self._node("Abs", [value], f"{name}.magnitude")
        peak = self._node("ReduceMax", [magnitude, self._integer("last_axis", [-1])], f"{name}.largest", keepdims=1)
        return self._node("Max", [peak, self._number("smallest_peak", _SMALLEST_PEAK)], f"{name}.peak")

    def _per_row(self, name: str, value: str, weight: str, weight_scales: NDArray[np.float32], output: str) -> str:
        peak = self._peak(name, value)
        shares = self._node("Div", [value, peak], f"{name}.shares")
        product = self._integer_product(name, shares, self._number("one_127th", 1 / 127), weight, weight_scales)
        return self._node("Mul", [product, peak], output)

    def _per_row_two_terms(
        self, name: str, value: str, weight: str, weight_scales: NDArray[np.float32], output: str
    ) -> str:
        peak = self._peak(name, value)
        step = self._node("Mul", [peak, self._number("one_127th", 1 / 127)], f"{name}.step")
        steps = self._node("Div", [value, step], f"{name}.steps")
        error = self._node("Sub", [steps, self._node("Round", [steps], f"{name}.rounded")], f"{name}.error")
        # The error is at most half a step: 254 makes it 127.
        error = self._node("Mul", [error, self._number("error_steps", 254)], f"{name}.error_steps")
        both = self._node("Concat", [steps, error], f"{name}.both", axis=0)
        product = self._integer_product(name, both, self._number("one", 1), weight, weight_scales)
        terms = [f"{name}.first_term", f"{name}.second_term"]
        self._nodes.append(helper.make_node("Split", [product], terms, name=f"{name}.terms", axis=0, num_outputs=2))
        small = self._node("Mul", [terms[1], self._number("one_254th", 1 / 254)], f"{name}.small_term")
        total = self._node("Add", [terms[0], small], f"{name}.total")
        return self._node("Mul", [total, step], output)

    def _integer_product(
        self, name: str, value: str, scale: str, weight: str, weight_scales: NDArray[np.float32]
    ) -> str:
        """Round value / scale to whole numbers from -127 to 127 and multiply.

        They go as uint8 with zero point 128: int8 with int8 weights is as fast on Arm, but ten times slower on x86.
        """
        zero = "zero_point_128"
        if not self._has(zero):
            self._data.add(zero, np.asarray(128, np.uint8))
        quantized = self._node("QuantizeLinear", [value, scale, zero], f"{name}.quantized")
        scales = self._data.add(f"{name}.weight_scale", weight_scales)
        inputs = [quantized, weight, scale, scales, zero]
        return self._node("MatMulIntegerToFloat", inputs, f"{name}.integer_product", domain=_MICROSOFT)

    def _last_position(self, value: str, name: str) -> str:
        """(B, S, features) -> (B, features)."""
        return self._node("Gather", [value, self._integer("last_position", -1)], name, axis=1)

    def _number(self, name: str, value: float) -> str:
        return name if self._has(name) else self._data.add(name, np.asarray(value, np.float32))

    def _integer(self, name: str, value: int | list[int]) -> str:
        return name if self._has(name) else self._data.add(name, np.asarray(value, np.int64))

    def _has(self, name: str) -> bool:
        return any(tensor.name == name for tensor in self._data.initializers)

    def _node(self, kind: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        self._nodes.append(helper.make_node(kind, inputs, [output], name=output, domain=domain, **attributes))
        return output
