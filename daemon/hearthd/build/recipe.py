"""How each matmul of a decoder is computed: the outcome of calibration, and what the graph is built from.

Knows no weights and no ONNX. `calibrate` and `quantize` fill it in, `weights` and `graph` read it, the manifest keeps its
`to_json()`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["MatMulForm", "MatMulName", "MatMulRecipe", "Recipe"]


class MatMulForm(enum.Enum):
    """How one matmul runs. Every form is batch-invariant: a row's result depends on that row alone.

    Weights of the int8 forms are int8 with one scale for each output feature: the kernel that is fast with and without
    dot-product instructions (Cortex-A76 and A72). One activation scale for a whole dynamic tensor, as
    DynamicQuantizeMatMul has it, is not among the forms: one caller's tokens would change another caller's numbers.
    """

    FLOAT = "float"
    # uint8 activations, scale and zero point fixed by calibration: one kernel to quantise, one to multiply.
    STATIC = "static"
    # int8 activations, scale from each row's own peak: exact where a few tokens are far larger than the others.
    PER_ROW = "per_row"
    # The same and a second int8 term for the rounding error of the first, as further rows of the same multiplication:
    # 15 bits of activation while the weights are read once.
    PER_ROW_TWO_TERMS = "per_row_two_terms"


@dataclass(frozen=True, slots=True, order=True)
class MatMulName:
    """Which matmul: `kind` is qkv, o, gate_up, down or lm_head; `layer` is -1 for lm_head."""

    kind: str
    layer: int = -1

    def __str__(self) -> str:
        return self.kind if self.layer < 0 else f"layers.{self.layer}.{self.kind}"


@dataclass(frozen=True, slots=True)
class MatMulRecipe:
    """One matmul's form; `scale` and `zero_point` (uint8) of the input only for STATIC."""

    form: MatMulForm
    scale: float = 0.0
    zero_point: int = 0


@dataclass(slots=True)
class Recipe:
    """A whole decoder's.

    smoothing: for each matmul the factors, float32 (input features,), that its inputs are divided by and the rows of its
    weight multiplied with (SmoothQuant, Xiao et al. 2022). They are folded into what comes before: the norm's weight,
    the rows of up, the rows of v. Missing means ones.
    """

    matmuls: dict[MatMulName, MatMulRecipe] = field(default_factory=dict)
    smoothing: dict[MatMulName, NDArray[np.float32]] = field(default_factory=dict)
    notes: dict[str, object] = field(default_factory=dict)

    def of(self, name: MatMulName) -> MatMulRecipe:
        """Return the matmul's recipe; float where none was chosen."""
        return self.matmuls.get(name, MatMulRecipe(MatMulForm.FLOAT))

    def to_json(self) -> dict[str, object]:
        """Return what the manifest keeps: forms and scales, the smoothing exponents in `notes`, not the factors."""
        forms: dict[str, object] = {}
        for name, matmul in sorted(self.matmuls.items()):
            row: dict[str, object] = {"form": matmul.form.value}
            if matmul.form is MatMulForm.STATIC:
                row |= {"scale": float(f"{matmul.scale:.6g}"), "zero_point": matmul.zero_point}
            forms[str(name)] = row
        return {"matmuls": forms, **self.notes}

    def count_by_form(self) -> Mapping[str, int]:
        """Return how many matmuls have each form."""
        counts: dict[str, int] = {}
        for matmul in self.matmuls.values():
            counts[matmul.form.value] = counts.get(matmul.form.value, 0) + 1
        return counts
