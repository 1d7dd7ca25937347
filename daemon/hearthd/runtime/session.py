"""A graph as ONNX Runtime runs it. With `runner`, which calls this, the only import of ONNX Runtime for serving."""

from pathlib import Path

import onnxruntime as ort

from hearthd.errors import BundleError, ShortOfMemoryError
from hearthd.runtime.plain_attention import choose_plain_attention

__all__ = ["open_session"]

# What ONNX Runtime says when it gets no memory, for which it has no error of its own.
_NO_MEMORY = ("bad_alloc", "Failed to allocate memory")


def open_session(model_path: Path, num_threads: int, *, has_neighbours: bool = False) -> ort.InferenceSession:
    """Load a graph. num_threads: at least 1, set explicitly, since ONNX Runtime ignores a CPU mask.

    has_neighbours: other sessions run between its runs. Its threads would still spin while those compute: two models
    that take turns then need 1.3 times as long for a step [M: ratios within a run, default model, 2 threads].
    Raises BundleError if ONNX Runtime refuses the graph, ShortOfMemoryError if there is too little for it now.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # Shapes differ from run to run: a remembered pattern would only hold memory.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    if has_neighbours:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    choose_plain_attention()
    try:
        return ort.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
    # ONNX Runtime raises types of its own, which derive from Exception alone.
    except Exception as error:
        if any(words in str(error) for words in _NO_MEMORY):
            raise ShortOfMemoryError(
                f"there is not enough memory to load {model_path}; stop other programs, or raise the service's "
                "MemoryMax, or serve a smaller model"
            ) from error
        raise BundleError(f"ONNX Runtime cannot load {model_path}: {str(error).splitlines()[0]}") from error
