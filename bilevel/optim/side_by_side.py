"""Whether an optimizer does to stacked replicas what it does to one."""

from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.errors import ConfigurationError
from bilevel.optim.foreign import SCALES, name_of, random_like


@torch.no_grad()
def check_side_by_side(
    transformation: Any, like: Any, *, hyperparameters: Mapping[str, Any] | None = None
) -> None:
    """Raise unless replicas that are stacked go through the steps that each would by itself.

    Args:
        transformation: As of `check_differentiable`.
        like: The parameters of several replicas, the first dimension of every leaf.
        hyperparameters: As of `check_differentiable`.

    Raises:
        ConfigurationError: A norm or a choice by shape takes all replicas for one.
    """
    made = transformation if hyperparameters is None else transformation(**hyperparameters)
    start = random_like(like, 1.0, 0)
    grads = [random_like(like, scale, seed) for seed, scale in enumerate(SCALES, start=1)]

    def updates_of(pick: Callable[[Tensor], Tensor]) -> list[Tensor]:
        params, found = optree.tree_map(pick, start), []
        state = made.init(params)
        for grad in grads:
            own = optree.tree_map(pick, grad)
            change, state = made.update(own, state, params=params, inplace=False)
            found += optree.tree_leaves(change)
        return found

    together = updates_of(lambda leaf: leaf)
    try:
        alone = updates_of(lambda leaf: leaf[0])
    except ConfigurationError:
        return  # It has hyperparameters for each replica.
    for every, one in zip(together, alone, strict=True):
        if torch.linalg.vector_norm(every[0] - one) > 1e-6 * torch.linalg.vector_norm(one):
            raise ConfigurationError(
                f"{name_of(made)} does not treat the parameters of Replicas, which are stacked, as "
                "it would those of one: its norms are over all replicas, or it looks at the "
                "dimensions of a leaf: use Hypergradient(inner_replicas=…), which runs them one "
                "after the other"
            )
