"""A softmax over inner steps whose temperature is solved for how concentrated it shall be."""

from typing import final

import torch
from torch import Tensor

from bilevel.checks import check_choice, check_number
from bilevel.truncation.distribution import StepDistribution
from bilevel.truncation.norms import NORMALIZATIONS
from bilevel.truncation.softmax import softmax


@final
class EffectiveSteps(StepDistribution):
    """p(t) ∝ exp(±x_t/τ) with τ such that exp(entropy of p) = fraction · N.

    N is the number of steps that may be chosen. The entropy grows with τ, so τ is unique; where
    several steps tie for the largest x, p cannot be more concentrated than uniform over these.

    Args:
        fraction: The effective number of steps as a share of N, in (0, 1].
        normalization: As for `Softmax`. A linear one does not matter here, a logarithm does.

    Raises:
        ConfigurationError: An argument outside its range.
    """

    def __init__(self, fraction: float, normalization: str = "log_standardize") -> None:
        self.fraction = check_number("fraction", fraction, above=0, maximum=1)
        self.normalization = check_choice("normalization", normalization, tuple(NORMALIZATIONS))

    def __call__(self, signal: Tensor, support: Tensor, sign: int = 1) -> Tensor:
        scores = sign * NORMALIZATIONS[self.normalization](signal)
        spread = float(scores[support].max() - scores[support].min())
        if spread == 0:
            return softmax(scores, support, 1.0)
        target = self.fraction * int(support.sum())
        # Bisection for log10 τ; beyond this range p is one-hot, or uniform, to rounding.
        low, high = -6.0, 6.0
        for _ in range(60):
            middle = (low + high) / 2
            probabilities = softmax(scores / spread, support, 10**middle)
            effective = float(torch.special.entr(probabilities).sum().exp())
            low, high = (middle, high) if effective < target else (low, middle)
        return probabilities
