"""Make a Q8_0 model of any GGUF file, as llama.cpp's own `llama-quantize --allow-requantize` does.

    python requantize_gguf.py SOURCE TARGET

Every matrix becomes Q8_0, the embedding too; norms stay float32. Run by `install.py` in the environment of
requirements/llama-cpp.txt.
"""

import ctypes
import sys

import llama_cpp

if __name__ == "__main__":
    source, target = sys.argv[1:]
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    parameters.allow_requantize = True
    sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)))
