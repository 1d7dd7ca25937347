"""Read a GGUF file: its metadata, and its tensors one at a time, from a memory map.

The file is input and may be hostile: every count, length and offset in the header is held against the size of the file
and a limit before anything is allocated. The `gguf` package's own reader makes one NumPy view per token string
(seconds and hundreds of MB with a vocabulary of 150,000), so only its dequantisation is used here.

Knows the container and nothing of models: no architecture, no tokenizer. Called by gguf_checkpoint.

Layout: ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from hearthd.errors import BuildError

MetadataValue = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_MAX_METADATA: Final = 65_536
_MAX_TENSORS: Final = 65_536
_MAX_NAME_BYTES: Final = 256
_MAX_STRING_BYTES: Final = 16 * 2**20
_MAX_ARRAY_ITEMS: Final = 4 * 2**20
_MAX_DIMENSIONS: Final = 4
_STRING: Final = 8
_ARRAY: Final = 9
# GGUF value type -> struct format; 8 is a string, 9 an array.
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# What these checkpoints are made of; the others (i-quants, ternary, integers) are refused by name.
_READABLE: Final = tuple(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor's blocks stand; `shape` is in NumPy's order, rows first."""

    name: str
    shape: tuple[int, ...]
    encoding: GGMLQuantizationType
    offset: int
    num_bytes: int

    @property
    def row_bytes(self) -> int:
        """The bytes of one row (of the last dimension)."""
        block_items, block_bytes = GGML_QUANT_SIZES[self.encoding]
        return self.shape[-1] // block_items * block_bytes


class GgufFile:
    """An open GGUF file. `metadata` and `tensors` are read at once, tensor data only when asked for."""

    def __init__(self, path: Path) -> None:
        """Map the file and read its header. Raises BuildError for a file that is missing, cut off or malformed."""
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise BuildError(f"{path}: cannot be read: {error}") from error
        try:
            header = _Header(path, self._map)
            self.metadata: dict[str, MetadataValue] = header.metadata
            self.tensors: dict[str, TensorInfo] = header.tensors
        except BaseException:
            self._map.close()
            raise

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of a tensor, dequantised: a new float32 array of shape (stop - start, columns).

        A tensor of one dimension is one row. Raises KeyError for an unknown name, IndexError for rows it has not.
        """
        info = self.tensors[name]
        columns = info.shape[-1]
        num_rows = math.prod(info.shape[:-1])
        if not 0 <= start <= stop <= num_rows:
            raise IndexError(f"rows {start}:{stop} of {name}, which has {num_rows}")
        # Bytes are copied out of the map: a NumPy view would keep the map from being closed.
        data = self._map[info.offset + start * info.row_bytes : info.offset + stop * info.row_bytes]
        blocks = np.frombuffer(data, dtype=np.uint8)
        if info.encoding == GGMLQuantizationType.F32:
            return blocks.view("<f4").astype(np.float32).reshape(stop - start, columns)
        if info.encoding == GGMLQuantizationType.F16:
            return blocks.view("<f2").astype(np.float32).reshape(stop - start, columns)
        # float16 scales of a hostile file may be infinite; whoever uses the weights checks that they are finite.
        with np.errstate(all="ignore"):
            values = dequantize(blocks.reshape(stop - start, info.row_bytes), info.encoding)
        return np.asarray(values, dtype=np.float32).reshape(stop - start, columns)

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Header:
    """One pass over the header, with a cursor that cannot leave the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._cursor = 0
        if data[:4] != _MAGIC:
            raise self._error("does not start with 'GGUF'; give a GGUF file or a Hugging Face checkpoint directory")
        self._cursor = 4
        version = self._integer("I")
        if version not in _VERSIONS:
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            raise self._error(
                "is big-endian; only little-endian GGUF is read"
                if big_endian
                else f"has GGUF version {version}; versions 2 and 3 are read"
            )
        num_tensors = self._count("tensors", _MAX_TENSORS, item_bytes=24)
        num_metadata = self._count("metadata entries", _MAX_METADATA, item_bytes=13)
        self.metadata: dict[str, MetadataValue] = {}
        for _ in range(num_metadata):
            key = self._string(_MAX_NAME_BYTES)
            if key in self.metadata:
                raise self._error(f"has the metadata key {key!r} twice")
            self.metadata[key] = self._value(self._integer("I"), key)
        infos = [self._tensor_info() for _ in range(num_tensors)]
        self.tensors = self._placed(infos)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(_MAX_NAME_BYTES)
        num_dimensions = self._integer("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._error(f"says that tensor {name!r} has {num_dimensions} dimensions; 1 to 4 are allowed")
        shape = tuple(self._integer("Q") for _ in range(num_dimensions))[::-1]
        return name, shape, self._integer("I"), self._integer("Q")

    def _placed(self, infos: list[tuple[str, tuple[int, ...], int, int]]) -> dict[str, TensorInfo]:
        """Resolve offsets, which count from the aligned end of the header, and hold them against the file's size."""
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise self._error(f"has general.alignment {alignment!r}; a power of two up to 1048576 is needed")
        start = -(-self._cursor // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, number, offset in infos:
            if name in tensors:
                raise self._error(f"has the tensor {name!r} twice")
            encoding = self._encoding(name, number)
            block_items, block_bytes = GGML_QUANT_SIZES[encoding]
            if min(shape) < 1 or shape[-1] % block_items:
                raise self._error(f"has tensor {name!r} of shape {shape}, not whole {encoding.name} blocks")
            num_bytes = math.prod(shape) // block_items * block_bytes
            if start + offset + num_bytes > self._size:
                raise self._error(
                    f"is cut off: tensor {name!r} ends at byte {start + offset + num_bytes}, "
                    f"the file has {self._size}; fetch it again"
                )
            tensors[name] = TensorInfo(name, shape, encoding, start + offset, num_bytes)
        return tensors

    def _encoding(self, name: str, number: int) -> GGMLQuantizationType:
        try:
            encoding = GGMLQuantizationType(number)
        except ValueError:
            encoding = None
        if encoding is None or encoding not in _READABLE:
            known = ", ".join(each.name for each in _READABLE)
            found = f"type {number}" if encoding is None else encoding.name
            raise self._error(f"stores tensor {name!r} as {found}; what is read: {known}")
        return encoding

    def _value(self, kind: int, key: str) -> MetadataValue:
        if kind == _STRING:
            return self._string(_MAX_STRING_BYTES)
        if kind in _SCALARS:
            value: bool | int | float = self._unpack(_SCALARS[kind])
            return value
        if kind != _ARRAY:
            raise self._error(f"has metadata {key!r} of unknown type {kind}")
        item_kind = self._integer("I")
        if item_kind == _STRING:
            count = self._count(f"items in {key!r}", _MAX_ARRAY_ITEMS, item_bytes=8)
            return [self._string(_MAX_STRING_BYTES) for _ in range(count)]
        if item_kind not in _SCALARS:
            raise self._error(f"has metadata {key!r}, an array of type {item_kind}, which is not read")
        code = _SCALARS[item_kind]
        item_bytes = struct.calcsize(f"<{code}")
        count = self._count(f"items in {key!r}", _MAX_ARRAY_ITEMS, item_bytes=item_bytes)
        values = list(struct.unpack_from(f"<{count}{code}", self._data, self._cursor))
        self._cursor += count * item_bytes
        return values

    def _count(self, what: str, limit: int, *, item_bytes: int) -> int:
        count = self._integer("Q")
        if count > limit:
            raise self._error(f"says it has {count} {what}; at most {limit} are allowed")
        if count * item_bytes > self._size - self._cursor:
            raise self._cut_off()
        return count

    def _string(self, limit: int) -> str:
        length = self._integer("Q")
        if length > self._size - self._cursor:
            raise self._cut_off()
        if length > limit:
            raise self._error(f"has a string of {length} bytes at byte {self._cursor}; at most {limit} are allowed")
        data = self._data[self._cursor : self._cursor + length]
        self._cursor += length
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"has a string at byte {self._cursor - length} that is not UTF-8") from error

    def _integer(self, code: str) -> int:
        value: int = self._unpack(code)
        return value

    def _unpack(self, code: str) -> int:
        size = struct.calcsize(f"<{code}")
        if size > self._size - self._cursor:
            raise self._cut_off()
        (value,) = struct.unpack_from(f"<{code}", self._data, self._cursor)
        self._cursor += size
        return value  # type: ignore[no-any-return]

    def _cut_off(self) -> BuildError:
        return self._error(f"is cut off in the header at byte {self._cursor} of {self._size}; fetch it again")

    def _error(self, message: str) -> BuildError:
        return BuildError(f"{self._path}: {message}")
