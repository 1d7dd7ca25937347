"""The recipe of a checkpoint: for each matmul the form that is worth its time, by measurement.

The decoder runs in float32 over calibration text (`calibrate`), weights are rounded with error feedback (`rounding`),
and each matmul is tried alone in a coarser form (`sensitivity`). Then every matmul takes the form with the least
divergence + price x time; the price is the highest at which the divergences still add up to no more than `MAX_LOSS`.
So the few matmuls with outliers among their inputs get a second term, and where a fixed scale does, none pays for more.

Knows no graph and no file but the scratch directories that it hands on. Called by `builder`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.build.decoder.attention import KVScales
from hearthd.build.decoder.matmuls import input_features, output_features
from hearthd.build.decoder.recipe import MatMulForm, MatMulName, MatMulRecipe, Recipe
from hearthd.build.decoder.rounding import ErrorFeedback, Rounding
from hearthd.build.decoder.weights import TensorSource
from hearthd.build.quantization.calibrate import InputStatistics, calibrate
from hearthd.build.quantization.documents import TokenDocument
from hearthd.build.quantization.sensitivity import measure_sensitivity

__all__ = ["MAX_LOSS", "FormChoice", "Found", "choose", "find_recipe"]

# Nats that the coarser activations of all matmuls together may add, as predicted. The int8 KV cache and the rounding of
# the weights add some 0.002, whatever is chosen here.
MAX_LOSS = 0.001
# Room above the calibration text's extremes: other text reaches a little further, and what is beyond is clipped.
_MARGIN = 1.05
# The same for the KV cache. A channel of one head sees fewer values than the whole input of a matmul, so its extremes
# are less certain: in unseen prose, some reached 1.5 times those of the calibration text.
_KV_MARGIN = 1.1
_FORMS = (MatMulForm.STATIC, MatMulForm.PER_ROW, MatMulForm.PER_ROW_TWO_TERMS)
_PRICE_STEPS = 60


@dataclass(frozen=True, slots=True)
class FormChoice:
    """One matmul. loss: nats by form, as predicted. form: the one that was chosen."""

    statistics: InputStatistics
    loss: Mapping[MatMulForm, float]
    form: MatMulForm


@dataclass(frozen=True, slots=True)
class Found:
    """A recipe and why it is so. rounding: of the weights that the recipe was found with. kv_scales: of the cache."""

    recipe: Recipe
    choices: Mapping[MatMulName, FormChoice]
    rounding: Rounding
    kv_scales: KVScales

    def to_json(self) -> dict[str, object]:
        """Return what the manifest keeps: the recipe, and what each form would cost, in nats."""
        recipe = self.recipe.to_json()
        losses = {
            str(name): {form.value: float(f"{loss:.3g}") for form, loss in choice.loss.items()}
            for name, choice in sorted(self.choices.items())
        }
        return recipe | {"rounding": "error feedback", "kv_cache": "int8 per channel", "losses": losses}


def find_recipe(
    source: TensorSource,
    spec: DecoderSpec,
    documents: Sequence[TokenDocument],
    *,
    scratch: Path,
    preset: NDArray[np.float32] | None,
    num_threads: int,
    report: Callable[[str, float], None],
) -> Found:
    """Search on calibration documents.

    scratch: a directory with room for 6 bytes a weight. preset: see `session.GraphSession`. report: called with what is
    being done and the share of it that is done.
    """
    directories = [scratch / name for name in ("calibration", "moments", "sensitivity")]
    for directory in directories:
        directory.mkdir()
    calibration = calibrate(
        source,
        spec,
        documents,
        directory=directories[0],
        moments_directory=directories[1],
        preset=preset,
        num_threads=num_threads,
        report=lambda share: report("calibration", share),
    )
    rounding = ErrorFeedback(directories[1])
    report("rounding", 0.0)
    sensitivity = measure_sensitivity(
        source,
        spec,
        documents,
        directory=directories[2],
        rounding=rounding,
        preset=preset,
        num_threads=num_threads,
        report=lambda share: report("sensitivity", share),
    )
    choices = choose(spec, calibration.inputs, sensitivity)
    matmuls = {name: _recipe(choice) for name, choice in choices.items()}
    kv_scales = KVScales.from_peaks(_KV_MARGIN * calibration.kv_peaks)
    return Found(Recipe(matmuls, rotated=spec.rotatable), choices, rounding, kv_scales)


def choose(
    spec: DecoderSpec,
    statistics: Mapping[MatMulName, InputStatistics],
    sensitivity: Mapping[MatMulName, float],
    *,
    max_loss: float = MAX_LOSS,
) -> Mapping[MatMulName, FormChoice]:
    """Choose every matmul's form.

    sensitivity: nats that each costs with one term by row. The error of a fixed scale is as much larger as its step is,
    squared. max_loss: see MAX_LOSS.
    """
    losses: dict[MatMulName, dict[MatMulForm, float]] = {}
    for name, row_loss in sensitivity.items():
        fixed = statistics[name]
        wider = (_MARGIN * fixed.peak / max(fixed.row_peak_rms, 1e-12)) ** 2
        losses[name] = dict(zip(_FORMS, (wider * row_loss, row_loss, 0.0), strict=True))
    times = {name: {form: _time(spec, name, form) for form in _FORMS} for name in losses}

    def chosen(price: float) -> dict[MatMulName, MatMulForm]:
        return {
            name: min(_FORMS, key=lambda form: loss[form] + price * times[name][form]) for name, loss in losses.items()
        }

    # Bisected: at a price of 0 all are exact, and each higher one makes the losses larger.
    low, high = 0.0, max(loss[MatMulForm.STATIC] for loss in losses.values()) + 1.0
    for _ in range(_PRICE_STEPS):
        price = (low + high) / 2
        low, high = (price, high) if _total(losses, chosen(price)) <= max_loss else (low, price)
    forms = chosen(low)
    # What is left of the allowance is less than the next matmul asks for; another one may still fit, the largest
    # saving of time first.
    savings = [(times[name][forms[name]] - times[name][form], name, form) for name in losses for form in _FORMS]
    for saving, name, form in sorted(savings, key=lambda each: -each[0]):
        cheaper = forms | {name: form}
        if saving > 0 and times[name][form] < times[name][forms[name]] and _total(losses, cheaper) <= max_loss:
            forms = cheaper
    return {name: FormChoice(statistics[name], losses[name], forms[name]) for name in losses}


def _total(losses: Mapping[MatMulName, Mapping[MatMulForm, float]], forms: Mapping[MatMulName, MatMulForm]) -> float:
    return sum(losses[name][form] for name, form in forms.items())


def _time(spec: DecoderSpec, name: MatMulName, form: MatMulForm) -> float:
    """Return the microseconds that a form takes beyond a fixed scale: 64 rows, one thread of an x86-64 with VNNI.

    Measured as processor time, medians of 25 turns: 576 to 3,072 features 291 with a fixed scale, 380 by row, 760 with
    a second term; 1,536 to 576 features 113, 127, 232. So a row's scale costs what is multiplied with it, the result,
    and a second term costs a second multiplication. When it decodes, the difference is a few percent of a matmul.
    """
    if form is MatMulForm.STATIC:
        return 0.0
    outputs = output_features(spec, name)
    # The LM head runs for the last position only.
    rows = 1 / 64 if name.kind == "lm_head" else 1.0
    by_row = 0.028 * outputs
    if form is MatMulForm.PER_ROW:
        return rows * by_row
    return rows * (by_row + 0.00015 * input_features(spec, name) * outputs)


def _recipe(choice: FormChoice) -> MatMulRecipe:
    scale = _MARGIN * choice.statistics.peak / 127 if choice.form is MatMulForm.STATIC else 0.0
    return MatMulRecipe(choice.form, scale)
