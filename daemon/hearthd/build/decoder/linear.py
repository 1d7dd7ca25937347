"""One matmul in each of its forms, as nodes of ONNX Runtime's CPU kernels.

Knows recipes and nodes, nothing of the decoder around a matmul. Called by `graph`.
"""

from __future__ import annotations

import numpy as np

from hearthd.build.decoder.nodes import MICROSOFT, Nodes
from hearthd.build.decoder.recipe import MatMulForm, MatMulName, MatMulRecipe
from hearthd.build.decoder.rounding import Rounding
from hearthd.build.decoder.weights import Linear

__all__ = ["SECOND_TERM", "add_linear", "switch_names"]

# The rounding error of the first term is at most half a step; times 254 it fills 8 bits.
_ERROR_STEPS = 254.0
SECOND_TERM = 1 / _ERROR_STEPS


def switch_names(matmul: MatMulName) -> tuple[str, str]:
    """Return the inputs of a SWITCHED matmul's graph, both float32 scalars.

    The first is the step of its activations, 0 for a step of each row's own. The second is what its second term counts:
    SECOND_TERM for two terms, 0 for one.
    """
    return f"switch.{matmul}.step", f"switch.{matmul}.second_term"


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
        return matmul.static(value, recipe.scale, bias, output)
    add_rows = {
        MatMulForm.PER_ROW: matmul.per_row,
        MatMulForm.PER_ROW_TWO_TERMS: matmul.per_row_two_terms,
        MatMulForm.SWITCHED: matmul.switched,
    }[recipe.form]
    product = add_rows(value, f"{name}.product" if bias else output)
    return nodes.node("Add", [product, bias], output) if bias else product


class _IntegerMatMul:
    """int8 weights with a scale for each output feature; the methods add the forms of the activations."""

    def __init__(self, nodes: Nodes, name: str, weight: str, weight_scales: str) -> None:
        self._nodes = nodes
        self._name = name
        self._weight = weight
        self._weight_scales = weight_scales

    def static(self, value: str, scale: float, bias: str | None, output: str) -> str:
        nodes, name = self._nodes, self._name
        scale_name = nodes.tensor(f"{name}.input_scale", np.asarray(scale, np.float32))
        return self._product(value, scale_name, output, bias)

    def per_row(self, value: str, output: str) -> str:
        nodes, name = self._nodes, self._name
        peak = self._peak(value)
        shares = nodes.node("Div", [value, peak], f"{name}.shares")
        product = self._product(shares, nodes.number("one_127th", 1 / 127), f"{name}.integer_product")
        return nodes.node("Mul", [product, peak], output)

    def per_row_two_terms(self, value: str, output: str) -> str:
        second_term = self._nodes.number("second_term", SECOND_TERM)
        return self._two_terms(value, self._row_step(value), second_term, output)

    def switched(self, value: str, output: str) -> str:
        """Two terms whose step may be a fixed one and whose second term may count for nothing."""
        nodes, name = self._nodes, self._name
        # A fixed step of zero stands for a step of each row's own.
        fixed = f"switch.{name}.step"
        is_row = nodes.node("Equal", [fixed, nodes.number("zero", 0)], f"{name}.is_row")
        step = nodes.node("Where", [is_row, self._row_step(value), fixed], f"{name}.switched_step")
        return self._two_terms(value, step, f"switch.{name}.second_term", output)

    def _two_terms(self, value: str, step: str, second_term: str, output: str) -> str:
        nodes, name = self._nodes, self._name
        steps = nodes.node("Div", [value, step], f"{name}.steps")
        error = nodes.node("Sub", [steps, nodes.node("Round", [steps], f"{name}.rounded")], f"{name}.error")
        error = nodes.node("Mul", [error, nodes.number("error_steps", _ERROR_STEPS)], f"{name}.error_steps")
        both = nodes.node("Concat", [steps, error], f"{name}.both", axis=0)
        product = self._product(both, nodes.number("one", 1), f"{name}.integer_product")
        terms = [f"{name}.first_term", f"{name}.second_term"]
        nodes.nodes("Split", [product], terms, axis=0, num_outputs=2)
        small = nodes.node("Mul", [terms[1], second_term], f"{name}.small_term")
        total = nodes.node("Add", [terms[0], small], f"{name}.total")
        return nodes.node("Mul", [total, step], output)

    def _row_step(self, value: str) -> str:
        step = [self._peak(value), self._nodes.number("one_127th", 1 / 127)]
        return self._nodes.node("Mul", step, f"{self._name}.step")

    def _peak(self, value: str) -> str:
        """Return each row's largest magnitude, (..., 1).

        It may be 0, which the row is divided by. QuantizeLinear makes some whole number or other of what comes out, and
        the product is multiplied by the peak again: 0. A node that kept the peak above 0 would cost a decode step 1 %.
        """
        nodes, name = self._nodes, self._name
        magnitude = nodes.node("Abs", [value], f"{name}.magnitude")
        return nodes.node("ReduceMax", [magnitude, nodes.integer("last_axis", [-1])], f"{name}.peak", keepdims=1)

    def _product(self, value: str, scale: str, output: str, bias: str | None = None) -> str:
        """Round value / scale to whole numbers from -128 to 127 and multiply.

        They go as uint8 with zero point 128: int8 with int8 weights is as fast on Arm, but ten times slower on x86.
        """
        nodes, name = self._nodes, self._name
        zero = nodes.shared("zero_point_128", np.asarray(128, np.uint8))
        quantized = nodes.node("QuantizeLinear", [value, scale, zero], f"{name}.quantized")
        inputs = [quantized, self._weight, scale, self._weight_scales, zero]
        inputs += ["", bias] if bias else []
        return nodes.node("MatMulIntegerToFloat", inputs, output, MICROSOFT)
