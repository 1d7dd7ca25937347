"""How each matmul of a decoder is computed: the outcome of calibration, and what the graph is built from.

Knows no weights and no ONNX. `calibrate` makes it, `weights` and `graph` read it, the manifest keeps its
`to_json()`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["MatMulForm", "MatMulName", "MatMulRecipe", "Recipe"]


class MatMulForm(enum.Enum):
    """How one matmul runs. Every form is batch-invariant: a row's result depends on that row alone.

    Weights of the int8 forms are int8 with one scale for each output feature: the kernel that is fast with and without
    dot-product instructions (Cortex-A76 and A72). One activation scale for a whole dynamic tensor, as
    DynamicQuantizeMatMul has it, is not among the forms: one caller's tokens would change another caller's numbers.
    """

    FLOAT = "float"
    # 8-bit activations, scale fixed by calibration: one kernel to quantise, one to multiply.
    STATIC = "static"
    # 8-bit activations, scale from each row's own peak: exact where a few tokens are far larger than the others.
    PER_ROW = "per_row"
    # The same and a second 8-bit term for the rounding error of the first, as further rows of the same multiplication:
    # 15 bits of activation while the weights are read once.
    PER_ROW_TWO_TERMS = "per_row_two_terms"
    # Any of the three int8 forms, as the graph's further inputs say: `sensitivity` tries them one after the other.
    SWITCHED = "switched"


@dataclass(frozen=True, slots=True, order=True)
class MatMulName:
    """Which matmul: `kind` is qkv, o, gate_up, down or lm_head; `layer` is -1 for lm_head."""

    kind: str
    layer: int = -1

    def __str__(self) -> str:
        return self.kind if self.layer < 0 else f"layers.{self.layer}.{self.kind}"


@dataclass(frozen=True, slots=True)
class MatMulRecipe:
    """One matmul's form; `scale`, of the input, only for STATIC."""

    form: MatMulForm
    scale: float = 0.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole decoder's: the form of each matmul, and whether the residual stream is rotated (see `weights`)."""

    matmuls: Mapping[MatMulName, MatMulRecipe]
    rotated: bool

    @classmethod
    def reference(cls) -> Recipe:
        """Return the recipe that changes nothing: every matmul in float32."""
        return cls({}, rotated=False)

    def of(self, name: MatMulName) -> MatMulRecipe:
        """Return the matmul's recipe; float where none was chosen."""
        return self.matmuls.get(name, MatMulRecipe(MatMulForm.FLOAT))

    def to_json(self) -> dict[str, object]:
        """Return what the manifest keeps."""
        forms: dict[str, object] = {}
        for name, matmul in sorted(self.matmuls.items()):
            row: dict[str, object] = {"form": matmul.form.value}
            if matmul.form is MatMulForm.STATIC:
                row["scale"] = float(f"{matmul.scale:.6g}")
            forms[str(name)] = row
        return {"rotated": self.rotated, "matmuls": forms}
