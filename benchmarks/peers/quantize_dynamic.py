"""Quantise an ONNX file to int8 as onnxruntime's own example does: quantize_dynamic.

    python quantize_dynamic.py SOURCE TARGET

Run by `install.py` in the environment of requirements/optimum.txt.
"""

import sys

from onnxruntime.quantization import QuantType, quantize_dynamic

if __name__ == "__main__":
    source, target = sys.argv[1:]
    quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True)
