"""Clipping of each row's norm."""

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from bilevel.clip.base import Clip, gradients_of


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
