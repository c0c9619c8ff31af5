"""The scores of DD-Ranking: what a set owes to its labels, and to augmentation."""

import math


def label_robust_score(
    real_hard: float,
    distilled_hard: float,
    distilled: float,
    random_real: float,
    weight: float = 0.5,
) -> float:
    """The share that is not owed to soft labels, (e^α − e^−1) / (e − e^−1), in [0, 1].

        α = w·IOR − (1 − w)·HLR
        HLR = acc(real, hard) − acc(distilled, hard)            what hard labels lose
        IOR = acc(distilled, any label) − acc(random real, any label)    what distilling gains

    Args:
        real_hard: Accuracy, a fraction, of networks trained on all real images.
        distilled_hard: On the distilled images with hard labels.
        distilled: On the distilled images with their own labels.
        random_real: On as many random real images.
        weight: W in [0, 1].

    Raises:
        ValueError: An accuracy is not a fraction, or the weight is outside [0, 1].

    Source: DD-Ranking (package `ddranking`).
    """
    _check(real_hard, distilled_hard, distilled, random_real, weight)
    hard_label_recovery = real_hard - distilled_hard
    improvement_over_random = distilled - random_real
    return _score(weight * improvement_over_random - (1 - weight) * hard_label_recovery)


def augmentation_robust_score(
    distilled: float,
    random_real: float,
    distilled_plain: float,
    random_real_plain: float,
    weight: float = 0.5,
) -> float:
    """The gain over random images with augmentation and without, on the same scale.

        β = w·(gain with augmentation) + (1 − w)·(gain without)

    Args:
        distilled: Accuracy, a fraction, on the distilled set with augmentation.
        random_real: On as many random real images with augmentation.
        distilled_plain: On the distilled set without augmentation.
        random_real_plain: On as many random real images without augmentation.
        weight: W in [0, 1].

    Raises:
        ValueError: An accuracy is not a fraction, or the weight is outside [0, 1].

    Source: DD-Ranking (package `ddranking`).
    """
    _check(distilled, random_real, distilled_plain, random_real_plain, weight)
    with_augmentation, without = distilled - random_real, distilled_plain - random_real_plain
    return _score(weight * with_augmentation + (1 - weight) * without)


def _score(exponent: float) -> float:
    return (math.exp(exponent) - math.exp(-1)) / (math.e - math.exp(-1))


def _check(*fractions: float) -> None:
    for value in fractions:
        if not 0 <= value <= 1:
            raise ValueError(f"{value}: accuracies and the weight are fractions in [0, 1]")
