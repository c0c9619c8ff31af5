"""Clipping of hypergradients, whose norms vary over orders of magnitude between windows."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import final

import torch
from torch import Tensor

from bilevel.checks import check_number
from bilevel.errors import ConfigurationError, NonFiniteError

__all__ = ["Clip", "MovingAverageClip", "MovingAverageRowClip"]


class Clip(ABC):
    """Clips gradients to a bound that follows a moving average of their norm n.

        e ← decay·e + (1 − decay)·min(n, cap·e)    (e starts at the first n; this comes first)
        bound = factor·e

    Args:
        decay: In [0, 1).
        factor: Positive.
        cap: What one outlier counts for in the average, at most, as a multiple of it; at least 1.
            None: its full norm, as published. A window over Adam's first steps can have a norm a
            hundred times the usual one. Uncapped, it lifts the average so far that it is hardly
            clipped itself, and then spoils the outer optimizer's second moments for long.

    Raises:
        ConfigurationError: An argument outside its range.

    Source: the released code of RaT-BPTT (arXiv 2311.07025), with decay 0.9 and factor 2;
    the cap is our own.
    """

    def __init__(self, decay: float = 0.9, factor: float = 2.0, cap: float | None = None) -> None:
        self.decay = check_number("decay", decay, minimum=0, below=1)
        self.factor = check_number("factor", factor, above=0)
        self.cap = math.inf if cap is None else check_number("cap", cap, minimum=1)
        self.average: float | None = None

    @abstractmethod
    def __call__(self, tensors: Iterable[Tensor]) -> tuple[float, float]:
        """Scale the `.grad` of `tensors` in place.

        Returns:
            (n before clipping, the bound).

        Raises:
            ConfigurationError: A tensor has no gradient.
            NonFiniteError: n is NaN or infinite; the average stays as it was.
        """

    def state_dict(self) -> dict[str, float | None]:
        """The moving average, None before the first call."""
        return {"average": self.average}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Restore the moving average.

        Raises:
            ConfigurationError: `state` has no average.
        """
        if "average" not in state:
            raise ConfigurationError(f"the state of a clip has an average, not {sorted(state)}")
        self.average = state["average"]

    def _bound(self, norm: float) -> float:
        """The bound once `norm` has moved the average."""
        if not math.isfinite(norm):
            raise NonFiniteError(f"the norm of the gradient to clip is {norm}")
        previous = norm if self.average is None else self.average
        counted = min(norm, self.cap * previous) if previous else norm
        self.average = self.decay * previous + (1 - self.decay) * counted
        return self.factor * self.average


def gradients_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The `.grad` of each tensor.

    Raises:
        ConfigurationError: One has none, or there is no tensor.
    """
    grads = [tensor.grad for tensor in tensors]
    found = [grad for grad in grads if isinstance(grad, torch.Tensor)]
    if not grads or len(found) < len(grads):
        raise ConfigurationError("every tensor to clip must have a gradient, at least one")
    return found


@final
class MovingAverageClip(Clip):
    """Clip the joint norm of all tensors' gradients to a multiple of its moving average.

        n = ‖g‖,    g ← g · min(1, bound / ‖g‖)

    Arguments and errors are those of `Clip`.
    """

    def __call__(self, tensors: Iterable[Tensor]) -> tuple[float, float]:
        grads = gradients_of(tensors)
        norm = float(torch.nn.utils.get_total_norm(grads))
        bound = self._bound(norm)
        if norm > bound:
            for grad in grads:
                grad.mul_(bound / norm)
        return norm, bound


@final
class MovingAverageRowClip(Clip):
    """Clip the norm of every row's gradient to a multiple of the moving average over all rows.

        n = mean of ‖g_i‖ over the rows with g_i ≠ 0,    g_i ← g_i · min(1, bound / ‖g_i‖)

    A row is what an index along the first dimension gives: an image, or a patch. One row with a
    large gradient is clipped alone, where `MovingAverageClip` would shrink all of them. Rows with
    a zero gradient, which no inner batch drew, do not count in the mean.

    Arguments and errors are those of `Clip`.
    """

    def __call__(self, tensors: Iterable[Tensor]) -> tuple[float, float]:
        grads = [torch.atleast_1d(grad) for grad in gradients_of(tensors)]
        norms = [torch.linalg.vector_norm(grad.reshape(len(grad), -1), dim=1) for grad in grads]
        all_norms = torch.cat(norms)
        norm = float(all_norms.sum() / all_norms.count_nonzero().clamp_min(1))
        bound = self._bound(norm)
        for grad, row_norms in zip(grads, norms, strict=True):
            # A zero length gives 0/0, which fmin passes over.
            scale = (bound / row_norms).fmin(torch.ones_like(row_norms))
            grad.mul_(scale.view(-1, *[1] * (grad.dim() - 1)))
        return norm, bound
