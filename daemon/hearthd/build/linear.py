"""One matmul in each of its forms, as nodes of ONNX Runtime's CPU kernels.

Knows recipes and nodes, nothing of the decoder around a matmul. Called by `graph`.
"""

from __future__ import annotations

import numpy as np

from hearthd.build.nodes import MICROSOFT, Nodes
from hearthd.build.recipe import MatMulForm, MatMulRecipe
from hearthd.build.rounding import SMALLEST_PEAK, Rounding
from hearthd.build.weights import Linear

__all__ = ["add_linear"]


def add_linear(
    nodes: Nodes, name: str, value: str, linear: Linear, recipe: MatMulRecipe, rounding: Rounding, output: str
) -> str:
    """Add value @ weight + bias in the recipe's form; the input features are the value's last axis."""
    bias = None if linear.bias is None else nodes.tensor(f"{name}.bias", linear.bias)
    if recipe.form is MatMulForm.FLOAT:
        weight = nodes.tensor(f"{name}.weight", linear.weight)
        product = nodes.node("MatMul", [value, weight], f"{name}.product" if bias else output)
        return nodes.node("Add", [product, bias], output) if bias else product

    integers, scales = rounding.rounded(name, linear.weight)
    weight = nodes.tensor(f"{name}.weight", integers)
    weight_scales = nodes.tensor(f"{name}.weight_scale", scales)
    matmul = _IntegerMatMul(nodes, name, weight, weight_scales)
    if recipe.form is MatMulForm.STATIC:
        return matmul.static(value, recipe.scale, recipe.zero_point, bias, output)
    add_rows = matmul.per_row if recipe.form is MatMulForm.PER_ROW else matmul.per_row_two_terms
    product = add_rows(value, f"{name}.product" if bias else output)
    return nodes.node("Add", [product, bias], output) if bias else product


class _IntegerMatMul:
    """int8 weights with a scale for each output feature; the methods add the forms of the activations."""

    def __init__(self, nodes: Nodes, name: str, weight: str, weight_scales: str) -> None:
        self._nodes = nodes
        self._name = name
        self._weight = weight
        self._weight_scales = weight_scales

    def static(self, value: str, scale: float, zero_point: int, bias: str | None, output: str) -> str:
        nodes, name = self._nodes, self._name
        scale_name = nodes.tensor(f"{name}.input_scale", np.asarray(scale, np.float32))
        zero = nodes.tensor(f"{name}.input_zero_point", np.asarray(zero_point, np.uint8))
        quantized = nodes.node("QuantizeLinear", [value, scale_name, zero], f"{name}.quantized")
        inputs = [quantized, self._weight, scale_name, self._weight_scales, zero]
        inputs += ["", bias] if bias else []
        return nodes.node("MatMulIntegerToFloat", inputs, output, MICROSOFT)

    def per_row(self, value: str, output: str) -> str:
        nodes, name = self._nodes, self._name
        peak = self._peak(value)
        shares = nodes.node("Div", [value, peak], f"{name}.shares")
        product = self._product(shares, nodes.number("one_127th", 1 / 127))
        return nodes.node("Mul", [product, peak], output)

    def per_row_two_terms(self, value: str, output: str) -> str:
        nodes, name = self._nodes, self._name
        peak = self._peak(value)
        step = nodes.node("Mul", [peak, nodes.number("one_127th", 1 / 127)], f"{name}.step")
        steps = nodes.node("Div", [value, step], f"{name}.steps")
        error = nodes.node("Sub", [steps, nodes.node("Round", [steps], f"{name}.rounded")], f"{name}.error")
        # The error is at most half a step: 254 makes it 127.
        error = nodes.node("Mul", [error, nodes.number("error_steps", 254)], f"{name}.error_steps")
        both = nodes.node("Concat", [steps, error], f"{name}.both", axis=0)
        product = self._product(both, nodes.number("one", 1))
        terms = [f"{name}.first_term", f"{name}.second_term"]
        nodes.nodes("Split", [product], terms, axis=0, num_outputs=2)
        small = nodes.node("Mul", [terms[1], nodes.number("one_254th", 1 / 254)], f"{name}.small_term")
        total = nodes.node("Add", [terms[0], small], f"{name}.total")
        return nodes.node("Mul", [total, step], output)

    def _peak(self, value: str) -> str:
        """Return each row's largest magnitude, (..., 1)."""
        nodes, name = self._nodes, self._name
        magnitude = nodes.node("Abs", [value], f"{name}.magnitude")
        peak = nodes.node("ReduceMax", [magnitude, nodes.integer("last_axis", [-1])], f"{name}.largest", keepdims=1)
        return nodes.node("Max", [peak, nodes.number("smallest_peak", SMALLEST_PEAK)], f"{name}.peak")

    def _product(self, value: str, scale: str) -> str:
        """Round value / scale to whole numbers from -127 to 127 and multiply.

        They go as uint8 with zero point 128: int8 with int8 weights is as fast on Arm, but ten times slower on x86.
        """
        nodes, name = self._nodes, self._name
        zero = nodes.shared("zero_point_128", np.asarray(128, np.uint8))
        quantized = nodes.node("QuantizeLinear", [value, scale, zero], f"{name}.quantized")
        inputs = [quantized, self._weight, scale, self._weight_scales, zero]
        return nodes.node("MatMulIntegerToFloat", inputs, f"{name}.integer_product", MICROSOFT)
