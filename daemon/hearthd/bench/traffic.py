"""How many bytes one decode step must read: what the graph says, nothing measured.

A step of one stream reads every weight of every matmul once, their scales and the norms too, but one row only of what
it looks up, as in the embedding; then the KV of the positions before it. Activations stay in the caches. On top of a
runner's speed that is what makes a share of the memory's bandwidth.

Knows ONNX and the names of the graph contract (`build/decoder/graph.py`). Called by `suite`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx

from hearthd.errors import BundleError

__all__ = ["StepTraffic"]

# Inputs that are tables of which a run of one token reads one row: by operator, their places.
_LOOKED_UP = {"Gather": (0,), "GatherBlockQuantized": (0, 2, 3), "GroupQueryAttention": (7, 8)}
_NO_WINDOW = -1


@dataclass(frozen=True, slots=True)
class StepTraffic:
    """What one decode step reads. weight_bytes: once for all streams, each of which adds row_bytes and its KV.

    kv: for each layer the bytes of one position's keys and values, and the window of positions, 0 without one.
    """

    weight_bytes: int
    row_bytes: int
    kv: tuple[tuple[int, int], ...]

    @classmethod
    def of_model(cls, path: Path) -> StepTraffic:
        """Read a graph; its external weights are not opened. Raises BundleError if it is none."""
        try:
            model = onnx.load(path, load_external_data=False)
        # onnx leaks the parser's own exceptions.
        except Exception as error:
            raise BundleError(f"{path} is no ONNX model: {str(error).splitlines()[0][:100]}") from error
        return cls.of_graph(model.graph)

    @classmethod
    def of_graph(cls, graph: onnx.GraphProto) -> StepTraffic:
        """Count a graph's initializers and its KV."""
        nodes = list(_nodes(graph))
        read_in_full: set[str] = set()
        looked_up: set[str] = set()
        for node in nodes:
            places = _LOOKED_UP.get(node.op_type, ())
            for place, name in enumerate(node.input):
                (looked_up if place in places else read_in_full).add(name)
        weights = rows = 0
        for tensor in graph.initializer:
            size = _num_bytes(list(tensor.dims), tensor.data_type)
            if tensor.name in read_in_full:
                weights += size
            elif tensor.name in looked_up:
                rows += size // max(tensor.dims[0] if tensor.dims else 1, 1)
        return cls(weights, rows, tuple(_kv(graph, nodes)))

    @property
    def kv_bytes_per_position(self) -> int:
        """Bytes of one position's keys and values in all layers."""
        return sum(size for size, _ in self.kv)

    def bytes_per_step(self, *, num_streams: int, context: float) -> float:
        """Bytes that one step reads when each stream has `context` positions behind it."""
        per_stream = self.row_bytes + sum(size * min(context, window or context) for size, window in self.kv)
        return self.weight_bytes + num_streams * per_stream


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes that a decode step runs: of a choice, `is_prompt` is false."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.name != "then_branch":
                for inner in (attribute.g, *attribute.graphs):
                    yield from _nodes(inner)


def _kv(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> Iterator[tuple[int, int]]:
    """Yield for each attention the bytes of a position in its two buffers, and its window."""
    # (B, kv_heads, positions, head_dim): a position of one row has the product of the second and the last.
    sizes = {}
    for value in graph.input:
        if value.name.startswith(("past_key", "past_value")):
            dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            sizes[value.name] = _num_bytes([dims[1], *dims[3:]], value.type.tensor_type.elem_type)
    for node in nodes:
        read = [sizes[name] for name in node.input if name in sizes]
        # An Identity hands on the buffers that a step does not use.
        if read and node.op_type != "Identity":
            windows = [attribute.i for attribute in node.attribute if attribute.name == "local_window_size"]
            window = windows[0] if windows else _NO_WINDOW
            yield sum(read), max(window, 0)


def _num_bytes(dims: list[int], data_type: int) -> int:
    if data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return (prod(dims) + 1) // 2
    return prod(dims) * int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)
