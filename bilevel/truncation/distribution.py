"""How likely each end of a window is, from the norms of the inner gradients."""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from bilevel.checks import check_choice, check_number
from bilevel.truncation.signals import NORMALIZATIONS


class StepDistribution(ABC):
    """Turns a non-negative signal over the inner steps, such as g_t, into probabilities."""

    @abstractmethod
    def __call__(self, signal: Tensor, support: Tensor, sign: int = 1) -> Tensor:
        """The probability of every inner step.

        Args:
            signal: float64 [T], finite and at least 0.
            support: bool [T], the steps that may be chosen; at least one.
            sign: 1 to favour large values, −1 to favour small ones.

        Returns:
            float64 [T], summing to one, zero outside `support`.
        """


@final
class Softmax(StepDistribution):
    """p(t) ∝ exp(±x_t/τ) over the steps that may be chosen, x the normalised signal.

    With "log_standardize" this is the power law p(t) ∝ g_t^{±1/(τ·s)}, s the standard deviation of
    log g: the same for any multiple of the loss, and as concentrated in one setting as in another.

    Args:
        normalization: "log_standardize", x = z-score of log g; "standardize", x = z-score of g;
            "none", x = g, as published. Raw norms need a temperature for every setting: on
            CIFAR-10 τ = 1 was nearly uniform with ten images per class, not with one.
        temperature: τ > 0.

    Raises:
        ConfigurationError: An argument outside its range.
    """

    def __init__(self, normalization: str = "log_standardize", temperature: float = 1.0) -> None:
        self.normalization = check_choice("normalization", normalization, tuple(NORMALIZATIONS))
        self.temperature = check_number("temperature", temperature, above=0)

    def __call__(self, signal: Tensor, support: Tensor, sign: int = 1) -> Tensor:
        scores = sign * NORMALIZATIONS[self.normalization](signal)
        return softmax(scores, support, self.temperature)


def softmax(scores: Tensor, support: Tensor, temperature: float) -> Tensor:
    """softmax(scores/τ) restricted to `support`; shape [T]."""
    return torch.softmax((scores / temperature).masked_fill(~support, -torch.inf), dim=0)


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
