"""DD-Ranking's scores: their formula, their range, and what they rise and fall with."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dd.evaluation.scores import augmentation_robust_score, label_robust_score

fractions = st.floats(0, 1)


def test_the_formula() -> None:
    alpha = 0.5 * (0.4 - 0.2) - 0.5 * (0.8 - 0.3)
    expected = (math.exp(alpha) - math.exp(-1)) / (math.exp(1) - math.exp(-1))
    assert label_robust_score(0.8, 0.3, 0.4, 0.2) == pytest.approx(expected)
    beta = 0.25 * (0.5 - 0.2) + 0.75 * (0.3 - 0.1)
    expected = (math.exp(beta) - math.exp(-1)) / (math.exp(1) - math.exp(-1))
    assert augmentation_robust_score(0.5, 0.2, 0.3, 0.1, weight=0.25) == pytest.approx(expected)


@given(fractions, fractions, fractions, fractions, fractions)
def test_scores_lie_between_0_and_1(a: float, b: float, c: float, d: float, w: float) -> None:
    assert -1e-12 <= label_robust_score(a, b, c, d, w) <= 1 + 1e-12
    assert -1e-12 <= augmentation_robust_score(a, b, c, d, w) <= 1 + 1e-12


@given(fractions, fractions, fractions, st.floats(0, 0.5), st.floats(0.01, 0.5))
def test_better_on_hard_labels_and_better_than_random_score_higher(
    real: float, hard: float, random_real: float, distilled: float, more: float
) -> None:
    low = label_robust_score(real, hard / 2, distilled, random_real)
    assert label_robust_score(real, hard / 2 + more, distilled, random_real) > low
    assert label_robust_score(real, hard / 2, distilled + more, random_real) > low
    low = augmentation_robust_score(distilled, random_real, hard / 2, random_real)
    assert augmentation_robust_score(distilled + more, random_real, hard / 2, random_real) > low
    assert augmentation_robust_score(distilled, random_real, hard / 2 + more, random_real) > low


@pytest.mark.parametrize("wrong", [-0.1, 44.5, float("nan")])
def test_percentages_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=f"{wrong}: accuracies and the weight"):
        label_robust_score(0.8, wrong, 0.4, 0.2)
