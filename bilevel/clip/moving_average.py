"""Clipping of the joint norm."""

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from bilevel.clip.base import Clip, gradients_of


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
