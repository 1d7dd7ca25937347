"""An ONNX file's nodes and where its tensors' bytes are, without loading those: a graph may be larger than the memory.

`onnx.load` would hold every weight that stands in the file itself. Here the file is mapped and walked by the field
numbers of onnx.proto; each offset is held against the size of the file that it leads into, and external data is read
from beside the model only. Knows nothing of models. Called by `onnx_checkpoint` and `oracle`.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from hearthd.bundles.external_locations import external_locations, length_delimited
from hearthd.errors import BuildError, BundleError

__all__ = ["Node", "OnnxFile", "Tensor"]

_MAX_NODES: Final = 200_000
# Of a node's or a tensor's description, without values.
_MAX_HEADER_BYTES: Final = 65_536
_MAX_DIMENSIONS: Final = 8
_MAX_SIZE: Final = 2**40
_LOCATION: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
# Field numbers of onnx.proto.
_MODEL_GRAPH: Final = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OPERATOR, _NODE_ATTRIBUTE = range(1, 6)
_ATTRIBUTE_TENSOR: Final = 5
# Packed little-endian floats are the same bytes as raw data.
_TENSOR_FLOATS, _TENSOR_RAW = 4, 9

Number: TypeAlias = int | float | tuple[int, ...]
# A protobuf message; onnx has no types of its own for mypy.
Message = TypeVar("Message", bound=Any)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A constant of the graph, and where its values are. file: None for the model's own.

    data_type: one of onnx.TensorProto's. readable: the values are plain bytes.
    """

    name: str
    shape: tuple[int, ...]
    data_type: int
    file: Path | None
    offset: int
    readable: bool


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the main graph; a Constant is no node but a tensor here."""

    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Number]


class OnnxFile:
    """An open ONNX file. `nodes` and `tensors` (by name) of the main graph are read at once, values when asked for."""

    def __init__(self, path: Path) -> None:
        """Map the file and walk its graph. Raises BuildError for what is damaged, or leads out of its directory."""
        self._path = path
        self.nodes: list[Node] = []
        self.tensors: dict[str, Tensor] = {}
        self._maps: dict[Path | None, mmap.mmap] = {}
        self._sizes: dict[Path, int] = {}
        try:
            self._maps[None] = _mapped(path)
            # Of subgraphs and functions too, because ONNX Runtime would read those.
            for location in sorted(external_locations(self._maps[None])):
                self._external_file(location)
            with memoryview(self._maps[None]) as data:
                start, stop = self._graph(data)
                self._walk_graph(data, start, stop)
        except BundleError as error:
            self.close()
            raise self._error(f"{str(error).removeprefix('the ONNX model ')}; fetch or export it again") from error
        except BaseException:
            self.close()
            raise

    def read(self, tensor: Tensor, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of a float32 tensor as a view of the mapped file: copy what is to be kept.

        A tensor of one dimension is one row. Raises IndexError for rows that it has not.
        """
        if tensor.data_type != onnx.TensorProto.FLOAT or not tensor.readable:
            kind = (
                onnx.TensorProto.DataType.Name(tensor.data_type)
                if tensor.data_type in onnx.TensorProto.DataType.values()
                else "unknown"
            )
            raise self._error(f"holds {_quoted(tensor.name)} as {kind}; take the float32 export (--dtype fp32)")
        columns = tensor.shape[-1] if tensor.shape else 1
        num_rows = math.prod(tensor.shape[:-1])
        if not 0 <= start <= stop <= num_rows:
            raise IndexError(f"rows {start}:{stop} of {tensor.name}, which has {num_rows}")
        if tensor.file not in self._maps:
            assert tensor.file is not None
            self._maps[tensor.file] = _mapped(tensor.file)
        offset = tensor.offset + start * columns * 4
        rows = np.frombuffer(self._maps[tensor.file], "<f4", (stop - start) * columns, offset)
        return rows.reshape(stop - start, columns)

    def close(self) -> None:
        """Unmap the files, once nobody holds a view any more."""
        self._maps.clear()

    def _graph(self, data: memoryview) -> tuple[int, int]:
        graphs = [(start, stop) for number, _, start, stop in length_delimited(data) if number == _MODEL_GRAPH]
        if len(graphs) != 1:
            raise self._error(f"holds {len(graphs)} graphs where an ONNX model has one; fetch or export it again")
        return graphs[0]

    def _walk_graph(self, data: memoryview, start: int, stop: int) -> None:
        for number, begin, end in _fields(data, start, stop):
            if number == _GRAPH_INITIALIZER:
                self._add_tensor(data, begin, end)
            elif number == _GRAPH_NODE:
                self._add_node(data, begin, end)
            if len(self.nodes) + len(self.tensors) > _MAX_NODES:
                raise self._error(f"has more than {_MAX_NODES} nodes and tensors, which no decoder has")

    def _add_node(self, data: memoryview, start: int, stop: int) -> None:
        texts: dict[int, list[str]] = {number: [] for number in range(_NODE_INPUT, _NODE_ATTRIBUTE)}
        attributes: list[tuple[int, int]] = []
        for number, begin, end in _fields(data, start, stop):
            if number in texts:
                texts[number].append(str(data[begin:end][:_MAX_HEADER_BYTES], "utf-8", "backslashreplace"))
            elif number == _NODE_ATTRIBUTE:
                attributes.append((begin, end))
        operator, name = ("".join(texts[number][-1:]) for number in (_NODE_OPERATOR, _NODE_NAME))
        outputs = tuple(texts[_NODE_OUTPUT])
        if operator == "Constant" and len(outputs) == 1:
            for where in attributes:
                for number, begin, end in _fields(data, *where):
                    if number == _ATTRIBUTE_TENSOR:
                        self._add_tensor(data, begin, end, outputs[0])
            return
        # Larger ones are subgraphs, which are not walked.
        small = [data[begin:end] for begin, end in attributes if end - begin <= _MAX_HEADER_BYTES]
        numbers = dict(number for each in small for number in self._numbers(each))
        self.nodes.append(Node(operator, name, tuple(texts[_NODE_INPUT]), outputs, numbers))

    def _numbers(self, attribute: memoryview) -> Iterator[tuple[str, Number]]:
        proto = self._parsed(onnx.AttributeProto(), bytes(attribute))
        if proto.type == onnx.AttributeProto.INT:
            yield proto.name, proto.i
        elif proto.type == onnx.AttributeProto.FLOAT:
            yield proto.name, proto.f
        elif proto.type == onnx.AttributeProto.INTS:
            yield proto.name, tuple(proto.ints)

    def _add_tensor(self, data: memoryview, start: int, stop: int, name: str = "") -> None:
        """Add a TensorProto that stands in data[start:stop]; name: instead of its own."""
        header, cursor = b"", start
        values: tuple[int, int] | None = None
        for number, tag, begin, end in length_delimited(data[start:stop]):
            if number in (_TENSOR_RAW, _TENSOR_FLOATS):
                header += bytes(data[cursor : start + tag][:_MAX_HEADER_BYTES])
                values, cursor = (start + begin, start + end), start + end
        # What is still larger has numbers that are neither floats nor raw, which no weight has: it fails below.
        proto = self._parsed(onnx.TensorProto(), header + bytes(data[cursor:stop][:_MAX_HEADER_BYTES]))
        name = name or proto.name
        shape = tuple(proto.dims)
        if len(shape) > _MAX_DIMENSIONS or not all(0 <= size < _MAX_SIZE for size in shape):
            raise self._error(f"has the tensor {_quoted(name)} of shape {shape[:9]}; fetch or export it again")
        if name in self.tensors:
            raise self._error(f"has two tensors of the name {_quoted(name)}; fetch or export it again")
        file, offset, num_bytes = self._place(name, proto, values)
        if proto.data_type == onnx.TensorProto.FLOAT and num_bytes not in (None, 4 * math.prod(shape)):
            raise self._error(
                f"has {num_bytes} bytes for the tensor {_quoted(name)} of shape {shape}; fetch or export it again"
            )
        self.tensors[name] = Tensor(name, shape, proto.data_type, file, offset, readable=num_bytes is not None)

    def _place(
        self, name: str, proto: onnx.TensorProto, values: tuple[int, int] | None
    ) -> tuple[Path | None, int, int | None]:
        """Return the file (None: the model's own), the offset and the number of bytes of a tensor's values."""
        if proto.data_location != onnx.TensorProto.EXTERNAL:
            return (None, 0, None) if values is None else (None, values[0], values[1] - values[0])
        entries = {entry.key: entry.value for entry in proto.external_data}
        file = self._external_file(entries.get("location", ""))
        size = self._sizes[file]
        offset = self._number(name, entries.get("offset", "0"))
        num_bytes = self._number(name, entries.get("length", str(max(size - offset, 0))))
        if offset + num_bytes > size:
            raise self._error(
                f"has a tensor {_quoted(name)} that ends at byte {offset + num_bytes} of {file.name}, which has {size}"
                "; fetch or export it again"
            )
        return file, offset, num_bytes

    def _external_file(self, location: str) -> Path:
        path = self._path.with_name(location) if _LOCATION.fullmatch(location) else None
        if path is None or not _stays(path):
            raise self._error(
                f"wants its weights from {ascii(location)[:80]}; files in the model's own directory are read"
            )
        if path not in self._sizes:
            if not path.is_file():
                raise self._error(f"wants its weights from {path.name}, which is not beside it; fetch it too")
            self._sizes[path] = path.stat().st_size
        return path

    def _number(self, name: str, text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,15}", text):
            raise self._error(f"has the offset or length {_quoted(text)} for the tensor {_quoted(name)}")
        return int(text)

    def _parsed(self, message: Message, data: bytes) -> Message:
        try:
            message.ParseFromString(data)
        except DecodeError as error:
            raise self._error("is damaged: a part of the graph cannot be parsed; fetch or export it again") from error
        return message

    def _error(self, message: str) -> BuildError:
        return BuildError(f"{self._path}: {message}")


def _fields(data: memoryview, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and stop of each length-delimited field of the message in data[start:stop]."""
    for number, _, begin, end in length_delimited(data[start:stop]):
        yield number, start + begin, start + end


def _stays(path: Path) -> bool:
    """Say whether a file is in its directory, or in the hub's own cache, whose snapshots are links to its blobs."""
    directory, target = path.parent.resolve(), path.resolve()
    if target.parent == directory:
        return True
    return any(above.name == "snapshots" and target.parent == above.parent / "blobs" for above in directory.parents)


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise BuildError(f"{path}: cannot be read: {error}") from error


def _quoted(text: str) -> str:
    return ascii(text[:80])
