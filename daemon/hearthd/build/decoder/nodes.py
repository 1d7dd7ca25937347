"""The nodes of a graph that is being written, in the order of the data's way, and the tensors that they share.

Knows ONNX's protos, no decoder. Called by `graph` and `linear`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from hearthd.build.decoder.external_data import ExternalData

__all__ = ["MICROSOFT", "Nodes"]

# The domain of ONNX Runtime's own operators.
MICROSOFT = "com.microsoft"


class Nodes:
    """Grows by one node or tensor at a call; most methods return the name of the result."""

    def __init__(self, data: ExternalData) -> None:
        self._data = data
        self._shared: dict[str, str] = {}
        self.protos: list[onnx.NodeProto] = []

    def branch(self) -> Nodes:
        """Return an empty place for the nodes of a graph within this one, whose tensors they share."""
        branch = Nodes(self._data)
        branch._shared = self._shared
        return branch

    def tensor(self, name: str, array: NDArray[np.generic]) -> str:
        """Add a constant."""
        return self._data.add(name, array)

    def number(self, name: str, value: float) -> str:
        """Return a float32 scalar, the same one at each call with this name."""
        return self.shared(name, np.asarray(value, np.float32))

    def integer(self, name: str, value: int | list[int]) -> str:
        """Return an int64 scalar or vector, the same one at each call with this name."""
        return self.shared(name, np.asarray(value, np.int64))

    def shared(self, name: str, array: NDArray[np.generic]) -> str:
        """Return a constant that several nodes take, the same one at each call with this name."""
        if name not in self._shared:
            self._shared[name] = self._data.add(name, array)
        return self._shared[name]

    def node(self, kind: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one result, which has the node's name."""
        self.nodes(kind, inputs, [output], domain, **attributes)
        return output

    def nodes(self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> None:
        """Add a node with several results, named after the first; "" stands for one that nobody wants."""
        self.protos.append(helper.make_node(kind, inputs, outputs, name=outputs[0], domain=domain, **attributes))
