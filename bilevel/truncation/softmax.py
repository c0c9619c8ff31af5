"""A softmax over inner steps at a given temperature."""

from typing import final

import torch
from torch import Tensor

from bilevel.checks import check_choice, check_number
from bilevel.truncation.distribution import StepDistribution
from bilevel.truncation.norms import NORMALIZATIONS


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
