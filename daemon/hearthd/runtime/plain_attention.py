"""Which of ONNX Runtime's two attention kernels is taken: the one without tiles, for serving and for judging alike.

The tiled kernel adds up in an order that depends on the run's length, also above one token on Arm (onnxruntime 1.31.1,
emulated Cortex-A76), and on the size of the second cache. This one is also faster: on x86-64 prefill by 7 to 13 %, one
stream by 0 to 14 %, eight by 7 %. Called by `runner`, and by `build.quantization.session`.
"""

import os
from typing import Final

__all__ = ["choose_plain_attention"]

# ONNX Runtime reads it when it loads a graph; no session option says the same.
_VARIABLE: Final = "ORT_GQA_DISABLE_FLASH_ATTENTION"


def choose_plain_attention() -> None:
    """Let the graphs that this process loads from now on have attention without tiles."""
    os.environ[_VARIABLE] = "1"
