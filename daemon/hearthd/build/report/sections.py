"""What a build's report says: each function makes one section of the page from what a build found.

Knows what the numbers mean, no sessions and no files. Called by `report`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from hearthd.build.decoder.recipe import MatMulForm, MatMulName
from hearthd.build.quantization.calibrate import InputStatistics
from hearthd.build.quantization.quality import MAX_KL, Figures, QualityFigures
from hearthd.build.quantization.search import MAX_LOSS, FormChoice, Found
from hearthd.build.report.page import details, figure, legend, paragraph, section, table
from hearthd.build.report.plots import Bar, Series, bars, forms_grid, log_plot
from hearthd.build.report.weight_ranges import WeightRange

__all__ = ["activations", "faithfulness", "losses", "recipe", "weights"]

# What Hearth aims at on its default model; a build is refused over MAX_KL only.
_AIM_KL = 0.010
_AIM_PERPLEXITY = 0.010
_AIM_TOP1 = 0.94

# Form -> its name for a reader, its class of the style sheet, how much it costs on a scale of 3.
_FORMS = {
    MatMulForm.STATIC: ("static", "calm", 1),
    MatMulForm.PER_ROW: ("per row", "warm", 2),
    MatMulForm.PER_ROW_TWO_TERMS: ("two terms", "hot", 3),
}


def faithfulness(figures: QualityFigures) -> str:
    """Return the figures over all text and by kind, against what is allowed and what is aimed at."""
    kinds: dict[str, Figures] = {"all text": figures, **figures.kinds}
    plot = bars(
        "Mean KL divergence from float32 by kind of text, in nats",
        [Bar(kind, each.kl_mean, f"{each.kl_mean:.4f}") for kind, each in kinds.items()],
        marks=[(f"aim {_AIM_KL:g}", _AIM_KL), (f"limit {MAX_KL:g}", MAX_KL)],
    )
    rows = [
        (
            kind,
            f"{each.kl_mean:.4f}",
            _percent(each.perplexity_int8 / each.perplexity_fp32 - 1),
            f"{each.top1_agreement:.1%}",
            f"{each.perplexity_fp32:.2f}",
            f"{each.perplexity_int8:.2f}",
            f"{each.tokens:,}",
        )
        for kind, each in kinds.items()
    ]
    rows.append(("aim", f"{_AIM_KL:.4f}", _percent(_AIM_PERPLEXITY), f"{_AIM_TOP1:.1%}", "", "", ""))
    rows.append(("limit", f"{MAX_KL:.4f}", "", "", "", "", ""))
    head = ("text", "mean KL", "ppl change", "top-1", "ppl float32", "ppl int8", "tokens")
    return section(
        "How faithful it is",
        [
            paragraph(
                "The bundle's own int8 graph against a float32 graph of the same weights, on text that nothing was "
                "calibrated on. KL is how far the distribution of the next token moved, averaged over positions; "
                "perplexity (ppl) is how surprised each graph is by the text itself; top-1 is the share of positions "
                "where both hold the same token likeliest."
            ),
            '<div class="beside">',
            figure("Mean KL by kind of text, in nats", [plot]),
            table("Faithfulness by kind of text", head, rows),
            "</div>",
        ],
    )


def recipe(found: Found) -> str:
    """Return the form of each matmul, and how many have it."""
    rows: dict[str, list[tuple[str, int, str]]] = {}
    for name, choice in _in_order(found.choices).items():
        label, style, level = _FORMS[choice.form]
        rows.setdefault(name.kind, []).append((style, level, f"{name}: {label}"))
    counts = {kind: Counter(style for style, _, _ in cells) for kind, cells in rows.items()}
    total = Counter(choice.form for choice in found.choices.values())
    table_rows = [
        (kind, *(str(count[style]) for _, style, _ in _FORMS.values()), str(sum(count.values())))
        for kind, count in counts.items()
    ]
    table_rows.append(("all", *(str(total[form]) for form in _FORMS), str(len(found.choices))))
    rotated = (
        "The residual stream is rotated, so that no few features are far larger than the others. "
        if found.recipe.rotated
        else "The residual stream is as the checkpoint has it: this architecture cannot be rotated. "
    )
    return section(
        "The recipe",
        [
            paragraph(
                "Weights are int8 everywhere, with a step for each output feature, rounded with error feedback. "
                f"{rotated}What differs from matmul to matmul is how its activations become int8: with one fixed step, "
                "with a step for each token, or with a second int8 term for what the first leaves. A fuller cell takes "
                "more time."
            ),
            legend([(style, label) for label, style, _ in _FORMS.values()]),
            '<div class="beside">',
            figure(
                "Form of each matmul", [forms_grid("Form of each matmul by kind and layer; counts are below", rows)]
            ),
            table("Matmuls by kind and form", ("kind", *(label for label, _, _ in _FORMS.values()), "all"), table_rows),
            "</div>",
        ],
    )


def losses(found: Found) -> str:
    """Return what each form of each matmul was predicted to cost."""
    total = sum(choice.loss[choice.form] for choice in found.choices.values())
    fixed = sum(choice.loss[MatMulForm.STATIC] for choice in found.choices.values())

    def panel(names: Sequence[MatMulName]) -> tuple[list[Series], list[tuple[str, ...]]]:
        chosen = [found.choices[name] for name in names]
        lines = [
            Series(_FORMS[form][0], _FORMS[form][1], [choice.loss[form] for choice in chosen])
            for form in (MatMulForm.STATIC, MatMulForm.PER_ROW)
        ]
        lines.append(Series("chosen", "chosen", [choice.loss[choice.form] for choice in chosen], is_line=False))
        return lines, [_loss_row(found, name) for name in names]

    return section(
        "What each form would cost",
        [
            paragraph(
                "Each matmul ran alone with a coarser activation on a little calibration text; the KL that this caused "
                "is its sensitivity, from which follows what a fixed step costs. Every matmul then got the cheapest "
                f"form so that all of them together are predicted to add at most {MAX_LOSS:g} nats: with the chosen "
                f"forms they add {total:.3g}, with fixed steps everywhere it would be {fixed:.3g}. Two terms are what "
                "the others were measured against, and stand at 0."
            ),
            legend([("calm", "static"), ("warm", "per row"), ("chosen", "chosen")]),
            _panels(found, "KL in nats", ("static", "per row", "chosen", "fixed step"), panel),
        ],
    )


def activations(found: Found) -> str:
    """Return how large each matmul's input gets."""
    choices = found.choices
    widest = max(choices, key=lambda name: _reach(choices[name].statistics))

    def panel(names: Sequence[MatMulName]) -> tuple[list[Series], list[tuple[str, ...]]]:
        statistics = [choices[name].statistics for name in names]
        lines = [
            Series("peak", "hot", [each.peak for each in statistics]),
            Series("typical peak of a token", "blue", [each.row_peak_rms for each in statistics]),
        ]
        rows: list[tuple[str, ...]] = [
            (_layer(name), f"{each.peak:.3g}", f"{each.row_peak_rms:.3g}", f"{_reach(each):.2f}")
            for name, each in zip(names, statistics, strict=True)
        ]
        return lines, rows

    return section(
        "Activations",
        [
            paragraph(
                "The largest input of each matmul on calibration text, and the largest of a typical token (root mean "
                "square over tokens). A fixed step must reach the peak: the further it is above a typical token, the "
                f"coarser that token becomes. It is furthest in {widest}, {_reach(choices[widest].statistics):.1f} "
                "times."
            ),
            legend([("hot", "peak"), ("blue", "typical peak of a token")]),
            _panels(found, "input magnitude", ("peak", "typical", "ratio"), panel),
        ],
    )


def weights(found: Found, ranges: Mapping[MatMulName, WeightRange]) -> str:
    """Return how large each matmul's weights are, and how fine their steps."""
    coarsest = max(ranges, key=lambda name: _coarseness(ranges[name]))

    def panel(names: Sequence[MatMulName]) -> tuple[list[Series], list[tuple[str, ...]]]:
        of_names = [ranges[name] for name in names]
        lines = [
            Series("largest", "hot", [each.peak for each in of_names]),
            Series("standard deviation", "blue", [each.std for each in of_names]),
            Series("int8 step", "calm", [each.step for each in of_names]),
        ]
        rows: list[tuple[str, ...]] = [
            (_layer(name), *(f"{value:.3g}" for value in asdict(each).values()), f"{_coarseness(each):.1%}")
            for name, each in zip(names, of_names, strict=True)
        ]
        return lines, rows

    return section(
        "Weights",
        [
            paragraph(
                "Each matmul's weights before they are rounded. The int8 step is the typical one of its output "
                "features (root mean square), each of which has its own: largest magnitude / 127. It is coarsest, "
                f"relative to the standard deviation, in {coarsest}: {_coarseness(ranges[coarsest]):.1%}."
            ),
            legend([("hot", "largest"), ("blue", "standard deviation"), ("calm", "int8 step")]),
            _panels(found, "weight", ("largest", "std", "int8 step", "step / std"), panel),
        ],
    )


def _panels(
    found: Found,
    what: str,
    columns: Sequence[str],
    panel: Callable[[Sequence[MatMulName]], tuple[list[Series], list[tuple[str, ...]]]],
) -> str:
    """Return a plot over layers for each kind of matmul with its table; for the head, which is one, the table."""
    by_kind: dict[str, list[MatMulName]] = {}
    for name in _in_order(found.choices):
        by_kind.setdefault(name.kind, []).append(name)
    parts: list[str] = []
    for kind, names in by_kind.items():
        lines, rows = panel(names)
        numbers = table(f"{what} of {kind} by layer", ("layer", *columns), rows)
        if names[0].layer < 0:
            parts.append(figure(kind, [numbers]))
        else:
            plot = log_plot(f"{what} of {kind} by layer, logarithmic", lines, unit="")
            parts.append(figure(f"{kind}: {what}", [plot, details("The numbers", numbers)]))
    return f'<div class="plots">{"".join(parts)}</div>'


def _in_order(choices: Mapping[MatMulName, FormChoice]) -> dict[MatMulName, FormChoice]:
    """Return the matmuls kind by kind as they follow each other in a layer, each from the first layer to the last."""
    kinds = list(dict.fromkeys(name.kind for name in choices))
    return {name: choices[name] for name in sorted(choices, key=lambda name: (kinds.index(name.kind), name.layer))}


def _loss_row(found: Found, name: MatMulName) -> tuple[str, ...]:
    choice, chosen = found.choices[name], found.recipe.of(name)
    fixed_step = f"{chosen.scale:.6g}" if chosen.form is MatMulForm.STATIC else "-"
    static, per_row = (f"{choice.loss[form]:.3g}" for form in (MatMulForm.STATIC, MatMulForm.PER_ROW))
    return _layer(name), static, per_row, _FORMS[choice.form][0], fixed_step


def _layer(name: MatMulName) -> str:
    return "-" if name.layer < 0 else str(name.layer)


def _reach(statistics: InputStatistics) -> float:
    return statistics.peak / max(statistics.row_peak_rms, 1e-12)


def _coarseness(each: WeightRange) -> float:
    return each.step / each.std if each.std else math.inf


def _percent(share: float) -> str:
    return f"{share:+.2%}".replace("%", " %")
