"""Graphs of bundles of manifest schema 2, which give the logits of the last position only, as today's graphs.

Their weights are what today's would be: one slice takes the place of each node that picked the last position. Knows
ONNX and that one difference. Called by `quality`, so that an older bundle can be judged.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

__all__ = ["read_graph"]

# How the results of the nodes ended that kept the last position.
_LAST_POSITION = ".last_position"
_END = 2**63 - 1


def read_graph(path: Path) -> bytes:
    """Return a bundle's graph, with the input `num_logits` if it has none; its weights stay where they are."""
    content = path.read_bytes()
    model = onnx.load_model_from_string(content)
    graph = model.graph
    if any(value.name == "num_logits" for value in graph.input):
        return content
    graph.input.append(helper.make_tensor_value_info("num_logits", TensorProto.INT64, [1]))
    for name, value in (("with_logits.end", _END), ("with_logits.axis", 1)):
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], [value]))
    nodes = [helper.make_node("Neg", ["num_logits"], ["first_with_logits"])]
    for node in graph.node:
        if node.output[0].endswith(_LAST_POSITION):
            bounds = ["first_with_logits", "with_logits.end", "with_logits.axis"]
            nodes.append(helper.make_node("Slice", [node.input[0], *bounds], list(node.output)))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    logits = next(output for output in graph.output if output.name == "logits")
    logits.type.tensor_type.ClearField("shape")
    return bytes(model.SerializeToString())
