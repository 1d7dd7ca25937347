"""The choice of forms: exact where it matters, cheap where it does not, and never over the allowance."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import tiny_models
from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.build.decoder.matmuls import matmul_names
from hearthd.build.decoder.recipe import MatMulForm, MatMulName
from hearthd.build.quantization.calibrate import InputStatistics
from hearthd.build.quantization.search import MAX_LOSS, choose

SPEC = DecoderSpec.from_config(tiny_models()["smollm2"].config)
NAMES = matmul_names(SPEC)
EVEN = {name: InputStatistics(peak=4.0, row_peak_rms=3.5) for name in NAMES}


def test_where_nothing_is_lost_all_are_cheap() -> None:
    chosen = choose(SPEC, EVEN, dict.fromkeys(NAMES, 0.0))
    assert {choice.form for choice in chosen.values()} == {MatMulForm.STATIC}
    assert set(chosen) == set(NAMES)


def test_the_one_with_outliers_gets_a_second_term() -> None:
    outlier = MatMulName("down", 1)
    chosen = choose(SPEC, EVEN, dict.fromkeys(NAMES, 1e-6) | {outlier: 1.0})
    assert chosen[outlier].form is MatMulForm.PER_ROW_TWO_TERMS
    assert all(choice.form is MatMulForm.STATIC for name, choice in chosen.items() if name != outlier)


def test_a_few_far_larger_tokens_make_a_fixed_scale_too_coarse() -> None:
    uneven = MatMulName("o", 0)
    statistics = EVEN | {uneven: InputStatistics(peak=350.0, row_peak_rms=3.5)}
    chosen = choose(SPEC, statistics, dict.fromkeys(NAMES, 1e-6))
    # (1.05 x 350 / 3.5) squared
    assert chosen[uneven].loss[MatMulForm.STATIC] == pytest.approx(105**2 * 1e-6)
    assert chosen[uneven].form is MatMulForm.PER_ROW


def test_the_dearer_second_term_goes_where_it_saves_most() -> None:
    small, large = MatMulName("o", 0), MatMulName("gate_up", 0)
    chosen = choose(SPEC, EVEN, dict.fromkeys(NAMES, 0.0) | {small: 0.9 * MAX_LOSS, large: 0.9 * MAX_LOSS})
    # Both by row would be over the allowance; the second term costs less time on the smaller matmul.
    assert chosen[small].form is MatMulForm.PER_ROW_TWO_TERMS
    assert chosen[large].form is MatMulForm.PER_ROW


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=len(NAMES), max_size=len(NAMES)), st.floats(1, 1e4))
def test_losses_never_add_up_to_more_than_allowed(losses: list[float], unevenness: float) -> None:
    statistics = {name: InputStatistics(peak=unevenness, row_peak_rms=1.0) for name in NAMES}
    chosen = choose(SPEC, statistics, dict(zip(NAMES, losses, strict=True)))
    assert np.sum([choice.loss[choice.form] for choice in chosen.values()]) <= MAX_LOSS
