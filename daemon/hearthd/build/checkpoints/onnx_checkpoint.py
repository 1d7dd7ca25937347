"""A directory that optimum exported as a checkpoint: the weights are read out of the graph, by module path.

The graph's constants have names like `onnx::MatMul_1085`, and one may stand for several modules, or a transposed one
for the embedding; but a node keeps the path of the module that it came from: what `/model/layers.0/mlp/up_proj/MatMul`
multiplies with is `model.layers.0.mlp.up_proj.weight`, transposed. Needs neither torch nor optimum, and loads no
tensor before it is asked for. Knows nothing of how an export is made (optimum_export). Called by `optimum_source`,
`optimum_export` and `oracle`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
from onnx import TensorProto

from hearthd.build.checkpoints.huggingface_checkpoint import HuggingFaceCheckpoint
from hearthd.build.checkpoints.onnx_file import OnnxFile
from hearthd.build.decoder.architecture import ARCHITECTURES
from hearthd.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from hearthd.build.checkpoints.huggingface_checkpoint import WeightFile
    from hearthd.build.checkpoints.onnx_file import Node, Tensor

__all__ = ["GRAPHS", "OnnxCheckpoint", "exported_graph", "is_exported", "refuse_quantized"]

# As repositories on the hub have it, and as optimum writes it.
GRAPHS: Final = ("onnx/model.onnx", "model.onnx")
_EMBEDDING: Final = "model.embed_tokens.weight"
_HEAD: Final = "lm_head.weight"
# The last part is the operator's; ONNX Runtime's optimiser (optimum's --optimize O2) puts the fusion's behind it.
_NODE_NAME: Final = re.compile(r"/((?:[A-Za-z0-9_.]+/)+)[A-Za-z0-9_]+(?:/[A-Za-z]+Fusion/)?")
# Which input the weight of a norm is.
_NORMS: Final = {"SimplifiedLayerNormalization": 1, "RMSNormalization": 1, "SkipSimplifiedLayerNormalization": 2}
# What the model builder of onnxruntime-genai, which some repositories on the hub come from, calls otherwise.
_BUILDER_NAMES: Final = (
    (re.compile(r"\.attn(?=\.|$)"), ".self_attn"),
    (re.compile(r"^model\.layers\.\d+\.final_norm_layernorm$"), "model.norm"),
)
_QUANTIZED: Final = re.compile(
    r"(Dynamic)?QuantizeLinear|DequantizeLinear|QLinear\w+|\w*MatMulInteger\w*|DynamicQuantize\w+|MatMulNBits|"
    r"MatMulBnb4|GatherBlockQuantized|QGemm|QAttention|QMoE"
)
# Other constants are sizes and positions. Of these only float32 can be read, the others are refused by name.
_FLOATS: Final = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
# Rows that two tensors are compared by at a time.
_CHUNK_ROWS: Final = 4_096


def is_exported(directory: Path) -> bool:
    """Say whether there is any ONNX graph where an export has it."""
    return any(each for folder in (directory, directory / "onnx") for each in folder.glob("*.onnx"))


def exported_graph(directory: Path) -> Path:
    """Return the path of a directory's float32 graph. Raises BuildError, with the remedy, if there is none."""
    for name in GRAPHS:
        if (directory / name).is_file():
            return directory / name
    others = sorted(each.name for folder in (directory, directory / "onnx") for each in folder.glob("*.onnx"))
    if others:
        raise BuildError(
            f"{directory}: has {', '.join(others[:5])} and neither of {' and '.join(GRAPHS)}, the float32 graph, which "
            "alone is read; fetch that one too, or export the checkpoint again"
        )
    raise BuildError(f"{directory}: has neither of {' and '.join(GRAPHS)}; give a directory that optimum exported")


def refuse_quantized(path: Path, file: OnnxFile) -> None:
    """Raise BuildError, with the remedy, for a graph that computes with integers."""
    for node in file.nodes:
        if _QUANTIZED.fullmatch(node.operator):
            raise BuildError(
                f"{path}: is quantised (it has {node.operator}); take the float32 graph, onnx/model.onnx on the hub, "
                "or export the checkpoint again with --dtype fp32"
            )


class OnnxCheckpoint(HuggingFaceCheckpoint):
    """A directory with config.json, tokenizer.json, a template, and a float32 graph of a whole decoder."""

    kind: ClassVar[str] = "ONNX export"
    remedy: ClassVar[str] = "give the directory that optimum exported to, which has it beside the graph or above onnx"

    @property
    def graph(self) -> Path:
        """Where the graph itself is."""
        return exported_graph(self._path)

    def _open_weights(self) -> Mapping[str, WeightFile]:
        offset = ARCHITECTURES[self.config["architectures"][0]].norm_offset
        weights = GraphWeights(exported_graph(self._path), norm_offset=offset)
        self._files.append(weights)
        self._divide_joined(weights)
        names = dict.fromkeys(weights.shapes, weights)
        if self.config["tie_word_embeddings"] and _HEAD in names and _EMBEDDING in names:
            # Often saved twice, the second time transposed.
            if not weights.same(_HEAD, _EMBEDDING):
                raise self._error(
                    "has tie_word_embeddings in config.json and an LM head that is not the embedding in the graph; "
                    "the two are not of one export"
                )
            del names[_HEAD]
        return names

    def _divide_joined(self, weights: GraphWeights) -> None:
        """Give q, k and v their own names where an exporter has joined what the checkpoint has apart."""
        heads, kv_heads, size, layers = (
            self.config.get(key)
            for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers")
        )
        if ARCHITECTURES[self.config["architectures"][0]].fused_projections or not (
            # Values that make no sense are refused with the whole configuration, later.
            isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(size, int) and isinstance(layers, int)
        ):
            return
        for name in [each for each in weights.shapes if each.rpartition(".")[0].endswith(".self_attn.qkv_proj")]:
            module, _, kind = name.rpartition(".qkv_proj.")
            parts = {"q": heads * size, "k": kv_heads * size, "v": kv_heads * size}
            weights.divide(name, {f"{module}.{part}_proj.{kind}": rows for part, rows in parts.items()})


@dataclass(frozen=True, slots=True)
class _Weight:
    """A constant, and whether it is the weight as Hugging Face has it, or transposed; rows: which of the weight's."""

    tensor: Tensor
    transposed: bool
    rows: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As Hugging Face has it."""
        shape = self.tensor.shape[::-1] if self.transposed else self.tensor.shape
        return shape if self.rows is None else (self.rows[1] - self.rows[0], *shape[1:])


class GraphWeights:
    """The weights in a graph by their Hugging Face names: `WeightFile`s of one ONNX file."""

    def __init__(self, path: Path, *, norm_offset: float = 0.0) -> None:
        """Open the graph. Raises BuildError for one that is damaged, quantised, or names no modules.

        norm_offset: what the exporter has folded into the norms, and the checkpoint has not. Taken off it may differ
        from the checkpoint in the last bits; added again it is, bit for bit, what the graph multiplies with.
        """
        self._path = path
        self._norm_offset = np.float32(norm_offset)
        self._file = OnnxFile(path)
        try:
            self._weights = self._found()
        except BaseException:
            self._file.close()
            raise
        self.shapes: dict[str, tuple[int, ...]] = {name: weight.shape for name, weight in self._weights.items()}

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of a weight as a new array; one of one dimension is one row."""
        weight = self._weights[name]
        num_rows = math.prod(weight.shape[:-1])
        if not 0 <= start <= stop <= num_rows:
            raise IndexError(f"rows {start}:{stop} of {name}, which has {num_rows}")
        if len(weight.shape) == 1:
            vector = self._file.read(weight.tensor, start, stop)[:, slice(*weight.rows or (None,))]
            return vector - self._norm_offset if name.endswith("norm.weight") else vector.astype(np.float32)
        first = weight.rows[0] if weight.rows else 0
        if not weight.transposed:
            return self._file.read(weight.tensor, first + start, first + stop).astype(np.float32)
        columns = self._file.read(weight.tensor, 0, weight.tensor.shape[0])[:, first + start : first + stop]
        return columns.T.astype(np.float32, order="C")

    def divide(self, name: str, parts: Mapping[str, int]) -> None:
        """Replace a weight by parts of its rows, in this order. Raises BuildError when there are more or fewer rows."""
        whole = self._weights.pop(name)
        del self.shapes[name]
        if whole.shape[0] != sum(parts.values()):
            raise self._error(f"has {name} of shape {whole.shape}; config.json says {sum(parts.values())} rows")
        first = 0
        for part, num_rows in parts.items():
            self._weights[part] = replace(whole, rows=(first, first + num_rows))
            self.shapes[part] = self._weights[part].shape
            first += num_rows

    def same(self, name: str, other: str) -> bool:
        """Say whether two weights have the same values."""
        first, second = self._weights[name], self._weights[other]
        if self.shapes[name] != self.shapes[other]:
            return False
        if first == second:
            return True
        num_rows = math.prod(self.shapes[name][:-1])
        return all(
            np.array_equal(self.rows(name, start, stop), self.rows(other, start, stop))
            for start in range(0, num_rows, _CHUNK_ROWS)
            for stop in [min(start + _CHUNK_ROWS, num_rows)]
        )

    def close(self) -> None:
        """Let go of the graph's files."""
        self._file.close()

    def _found(self) -> dict[str, _Weight]:
        refuse_quantized(self._path, self._file)
        constants = {
            name: _Weight(tensor, transposed=False)
            for name, tensor in self._file.tensors.items()
            if tensor.data_type in _FLOATS
        }
        linear: set[str] = set()
        for node in self._file.nodes:
            if node.operator in ("MatMul", "Gemm"):
                linear.add(_module(node))
            elif node.operator in ("Transpose", "Identity") and node.outputs and constants.keys() & node.inputs[:1]:
                self._add_view(constants, node)
        weights: dict[str, _Weight] = {}
        for node in self._file.nodes:
            module = _module(node)
            for kind, weight in _weights_of(node, constants, is_linear=module in linear) if module else ():
                name = f"{module}.{kind}"
                if weights.setdefault(name, weight) != weight:
                    raise self._error(f"has two tensors for {name!r}; export the checkpoint again")
        if not weights:
            raise self._error(
                "has no node that multiplies with a weight under its module's path, for example "
                "/model/layers.0/self_attn/q_proj/MatMul; export the checkpoint again without --optimize"
            )
        return weights

    def _add_view(self, constants: dict[str, _Weight], node: Node) -> None:
        """Note what a node makes of a constant, a tied embedding above all."""
        of = constants[node.inputs[0]]
        if node.operator == "Identity":
            constants[node.outputs[0]] = of
        elif len(of.tensor.shape) == 2 and node.attributes.get("perm", (1, 0)) == (1, 0):
            constants[node.outputs[0]] = _Weight(of.tensor, not of.transposed)

    def _error(self, message: str) -> BuildError:
        return BuildError(f"{self._path}: {message}")


def _module(node: Node) -> str:
    """Return the path of a node's module as Hugging Face writes it, "" if the node says none."""
    found = _NODE_NAME.fullmatch(node.name)
    module = found[1].rstrip("/").replace("/", ".") if found else ""
    for pattern, name in _BUILDER_NAMES:
        module = pattern.sub(name, module)
    return module


def _weights_of(node: Node, constants: Mapping[str, _Weight], *, is_linear: bool) -> Iterator[tuple[str, _Weight]]:
    """Yield "weight" or "bias" with each constant that a node takes as such.

    is_linear: the node's module multiplies matrices, so that what it adds is a bias; a norm multiplies with its weight.
    """
    inputs = [constants.get(name) for name in node.inputs]
    sizes = [0 if each is None else len(each.tensor.shape) for each in inputs]
    match node.operator:
        case "Gather" if sizes[:1] == [2] and inputs[0] is not None:
            yield "weight", inputs[0]
        case "MatMul" if sizes[1:] == [2] and inputs[1] is not None:
            # (in, out) here, (out, in) at Hugging Face.
            yield "weight", _Weight(inputs[1].tensor, not inputs[1].transposed)
        case "Gemm" if sizes[1:2] == [2] and inputs[1] is not None and _is_plain(node):
            transposed = inputs[1].transposed == bool(node.attributes.get("transB", 0))
            yield "weight", _Weight(inputs[1].tensor, transposed)
            if sizes[2:] == [1] and inputs[2] is not None:
                yield "bias", inputs[2]
        case "Add" | "Mul" if is_linear == (node.operator == "Add") and sorted(sizes) == [0, 1]:
            vector = inputs[sizes.index(1)]
            assert vector is not None
            yield "bias" if is_linear else "weight", vector
        case operator if operator in _NORMS and len(inputs) > _NORMS[operator]:
            norm = inputs[_NORMS[operator]]
            if norm is not None and len(norm.tensor.shape) == 1:
                yield "weight", norm


def _is_plain(node: Node) -> bool:
    """Say whether a Gemm does nothing but multiply and add."""
    return not node.attributes.get("transA", 0) and all(
        node.attributes.get(factor, 1.0) == 1.0 for factor in ("alpha", "beta")
    )
