"""An inner loss that is evaluated again before every compiled run."""

from __future__ import annotations

from typing import Any, final

import optree
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel.contract.repeatable import is_same
from bilevel.recording.inner import InnerLoop


@final
class Probe:
    """Whether the inner loss is the function that it was, by its value at one point.

    A `Snapshot` sees what can be reached without running anything. What is looked up by a name that
    is put together, in the environment or in a context variable is seen by its effect alone.

    Args:
        inner: The inner loop.
        params: θ, flat; copied, as is the batch.
        batch: The batch of a step.
    """

    def __init__(self, inner: InnerLoop, params: Tensor, batch: Any) -> None:
        self._inner, self._params = inner, params.detach().clone()
        self._batch = optree.tree_map(
            lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, batch
        )
        self._value = self._evaluate()

    def unchanged(self) -> bool:
        """Whether the value is what it was; the next one is compared with that of now."""
        before, self._value = self._value, self._evaluate()
        return is_same(before, self._value)

    @torch.no_grad()
    def _evaluate(self) -> Tensor | None:
        """None where it cannot be evaluated, as after an exchange of the network."""
        try:
            with sdpa_kernel(SDPBackend.MATH):
                return self._inner.loss(self._params, self._batch).detach()
        except Exception:
            return None
