"""ONNX external data written as it comes, so that no more than one tensor is in memory.

Knows ONNX's TensorProto, no graph. Called by `graph`.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import onnx
from numpy.typing import NDArray

__all__ = ["ExternalData"]

# ONNX Runtime maps external data from the file only at offsets that are multiples of the page, and of 64 KiB elsewhere.
_ALIGNMENT = 65_536
# Small tensors stay in the model itself: alignment would cost more than they hold, and the kernel maps the whole 64 KiB
# around each that is read.
_INLINE_BYTES = 16_384


class ExternalData:
    """A file of tensors beside a model. Use as a context manager; the file is complete when it ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._initializers: list[onnx.TensorProto] = []

    def __enter__(self) -> ExternalData:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def initializers(self) -> list[onnx.TensorProto]:
        """The tensors written so far, as the graph's initializers."""
        return self._initializers

    def add(self, name: str, array: NDArray[np.generic]) -> str:
        """Write a tensor; returns its name."""
        # Not ascontiguousarray, which would make a scalar an array of one.
        array = np.asarray(array, order="C")
        if array.nbytes <= _INLINE_BYTES:
            self._initializers.append(onnx.numpy_helper.from_array(array, name))
            return name
        self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
        tensor = onnx.TensorProto(
            name=name,
            dims=array.shape,
            data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in (("location", self._path.name), ("offset", self._file.tell()), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self._file.write(array.data)
        self._initializers.append(tensor)
        return name
