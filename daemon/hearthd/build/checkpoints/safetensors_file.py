"""Read a safetensors file: names and shapes at once, tensors a few rows at a time, as float32.

The `safetensors` package hands bfloat16 to NumPy only where ml_dtypes is installed; the format is a JSON header and
plain bytes, so it is read here, with every offset held against the file's size. Knows nothing of models. Called by
huggingface_checkpoint.
"""

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hearthd.errors import BuildError

_MAX_HEADER_BYTES: Final = 64 * 2**20
_MAX_TENSORS: Final = 65_536
_MAX_DIMENSIONS: Final = 4
# dtype -> (NumPy's name, bytes). bfloat16 is the upper half of a float32.
_DTYPES: Final = {"F64": ("<f8", 8), "F32": ("<f4", 4), "F16": ("<f2", 2), "BF16": ("<u2", 2)}


@dataclass(frozen=True, slots=True)
class _Entry:
    shape: tuple[int, ...]
    dtype: str
    offset: int
    num_bytes: int


class SafetensorsFile:
    """An open safetensors file. `shapes` is read at once, tensor data only when asked for."""

    def __init__(self, path: Path) -> None:
        """Map the file and read its header. Raises BuildError for a file that is missing, cut off or malformed."""
        self._path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise BuildError(f"{path}: cannot be read: {error}") from error
        try:
            self._entries = self._read_header()
        except BaseException:
            self._map.close()
            raise
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of a tensor: a new float32 array of shape (stop - start, columns).

        A tensor of one dimension is one row. Raises KeyError for an unknown name, IndexError for rows it has not.
        """
        entry = self._entries[name]
        columns = entry.shape[-1] if entry.shape else 1
        num_rows = math.prod(entry.shape[:-1])
        if not 0 <= start <= stop <= num_rows:
            raise IndexError(f"rows {start}:{stop} of {name}, which has {num_rows}")
        if entry.dtype not in _DTYPES:
            raise BuildError(
                f"{self._path}: tensor {name!r} is {entry.dtype}; {', '.join(_DTYPES)} are read. "
                "Quantised checkpoints cannot be built from: take the original one"
            )
        format_, item_bytes = _DTYPES[entry.dtype]
        row_bytes = columns * item_bytes
        # Bytes are copied out of the map: a NumPy view would keep the map from being closed.
        data = self._map[entry.offset + start * row_bytes : entry.offset + stop * row_bytes]
        items = np.frombuffer(data, dtype=format_).reshape(stop - start, columns)
        if entry.dtype == "BF16":
            return (items.astype(np.uint32) << np.uint32(16)).view(np.float32)
        with np.errstate(over="ignore"):  # a float64 that no float32 holds; whoever uses it checks for infinities
            return items.astype(np.float32)

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()

    def _read_header(self) -> dict[str, _Entry]:
        length = int.from_bytes(self._map[:8], "little")
        if len(self._map) < 8 or length > min(_MAX_HEADER_BYTES, len(self._map) - 8):
            raise self._error("is cut off, or is no safetensors file; fetch it again")
        try:
            header = json.loads(self._map[8 : 8 + length])
        except (ValueError, RecursionError) as error:
            raise self._error("has a header that is not JSON; fetch it again") from error
        if not isinstance(header, dict) or len(header) > _MAX_TENSORS:
            raise self._error(f"has a header that is no object of at most {_MAX_TENSORS} tensors")
        header.pop("__metadata__", None)
        return {name: self._entry(name, value, 8 + length) for name, value in header.items()}

    def _entry(self, name: str, value: Any, start: int) -> _Entry:
        try:
            dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
            numbers = [*shape, begin, end]
        except (KeyError, TypeError, ValueError) as error:
            raise self._error(f"says of tensor {name!r} no dtype, shape and data_offsets") from error
        if not isinstance(dtype, str) or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise self._error(f"has tensor {name!r} with a dtype, shape or offset that is none")
        if len(shape) > _MAX_DIMENSIONS or 0 in shape:
            raise self._error(f"has tensor {name!r} of shape {tuple(shape[:8])}; 1 to 4 dimensions, none 0, are read")
        if not begin <= end <= len(self._map) - start:
            raise self._error(
                f"is cut off: tensor {name!r} ends behind the file's {len(self._map)} bytes; fetch it again"
            )
        if dtype in _DTYPES and end - begin != math.prod(shape) * _DTYPES[dtype][1]:
            raise self._error(f"has tensor {name!r} of {end - begin} bytes, which is not its shape's size")
        return _Entry(tuple(shape), dtype, start + begin, end - begin)

    def _error(self, message: str) -> BuildError:
        return BuildError(f"{self._path}: {message}")
