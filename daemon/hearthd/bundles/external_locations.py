"""Which files an ONNX graph would read its weights from, found without loading it.

The serving side needs this one fact of the graph, before ONNX Runtime opens anything; importing `onnx` for it would
cost the daemon some 30 MB. Reads protobuf's wire format by the field numbers of onnx.proto. Called by `bundle`, and by
`build.onnx_file`, which reads more of a graph in the same way.
"""

from collections.abc import Iterator
from mmap import mmap
from typing import Final

from hearthd.errors import BundleError

# Message -> field number -> the message it holds; the fields that can lead to a tensor (onnx.proto, IR version 11).
_FIELDS: Final = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "ExternalEntry"},
}
_MAX_DEPTH: Final = 64


def external_locations(model: bytes | mmap) -> set[str]:
    """Return the `location` of every tensor with external data, in subgraphs and functions too.

    Raises BundleError when `model` is not protobuf.
    """
    locations: set[str] = set()
    with memoryview(model) as data:
        _walk(data, "Model", locations, _MAX_DEPTH)
    return locations


def length_delimited(data: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """Yield each length-delimited field of a message: number, where its tag begins, its content starts, and it stops.

    Texts, messages and packed numbers are such; single numbers are passed over. Raises BundleError for what is none.
    """
    cursor = 0
    while cursor < len(data):
        begin = cursor
        tag, cursor = _varint(data, cursor)
        wire_type = tag & 7
        if wire_type == 0:
            _, cursor = _varint(data, cursor)
        elif wire_type in (1, 5):
            cursor += 8 if wire_type == 1 else 4
        elif wire_type == 2:
            length, start = _varint(data, cursor)
            cursor = start + length
        else:  # groups, which ONNX does not use, and numbers that mean nothing
            raise BundleError(f"the ONNX model is damaged: wire type {wire_type}")
        if cursor > len(data):
            raise BundleError("the ONNX model is cut off")
        if wire_type == 2:
            yield tag >> 3, begin, start, cursor


def _walk(data: memoryview, message: str, locations: set[str], depth: int) -> None:
    if not depth:
        raise BundleError(f"the ONNX model nests deeper than {_MAX_DEPTH} messages")
    if message == "ExternalEntry":
        _read_entry(data, locations)
        return
    inner = _FIELDS[message]
    for number, value in _submessages(data):
        if number in inner:
            _walk(value, inner[number], locations, depth - 1)


def _read_entry(data: memoryview, locations: set[str]) -> None:
    """Read a StringStringEntryProto: key = 1, value = 2; of a field that stands twice the last one counts."""
    texts = {number: bytes(value) for number, value in _submessages(data)}
    if texts.get(1) == b"location":
        locations.add(texts.get(2, b"").decode("utf-8", errors="backslashreplace"))


def _submessages(data: memoryview) -> list[tuple[int, memoryview]]:
    """Return the length-delimited fields of a message; the others hold no tensors."""
    return [(number, data[start:stop]) for number, _, start, stop in length_delimited(data)]


def _varint(data: memoryview, cursor: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if cursor >= len(data):
            raise BundleError("the ONNX model is cut off")
        byte = data[cursor]
        cursor += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, cursor
    raise BundleError("the ONNX model is damaged: a number longer than 10 bytes")
