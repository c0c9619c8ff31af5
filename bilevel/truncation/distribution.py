"""The interface of a distribution over inner steps made from a per-step signal."""

from abc import ABC, abstractmethod

from torch import Tensor


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
