"""Several transformations as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import optree
import torch
from torchopt.base import EmptyState, GradientTransformation

from bilevel.errors import ConfigurationError
from bilevel.optim.base import Rule, on_vector, transformation_of


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """One transformation after the other: each is given what the one before makes of the gradient.

    The last one is usually an optimizer: `chain(clip_by_norm(1.0), sgd(0.1))`. Parameters of 16
    bits are rounded once, after the last one; before that all is in float32.

    Args:
        transformations: At least one, from here, from `torchopt`, or your own.

    Raises:
        ConfigurationError: One is no gradient transformation, or there is none.
    """
    if not transformations:
        raise ConfigurationError("chain() is empty: give it at least one transformation")
    for index, each in enumerate(transformations):
        check_transformation(f"argument {index} of chain", each)
    return transformation_of(Chain(transformations))


@final
@dataclass(frozen=True, eq=False)
class Chain(Rule):
    """The rule of `chain`."""

    transformations: tuple[Any, ...]

    def start(self, params: Any) -> Any:
        return tuple(each.init(params) for each in self.transformations)

    def step(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        after = []
        for each, own in zip(self.transformations, state, strict=True):
            grads, own = each.update(grads, own, params=params, inplace=False)
            after.append(own)
        return grads, tuple(after)

    def on_vector(self, like: Any) -> Chain | None:
        vectors = tuple(on_vector(each, like) for each in self.transformations)
        return None if any(each is None for each in vectors) else Chain(vectors)


def freeze() -> GradientTransformation:
    """Parameters that stay as they are: every update is 0. For parts of a tree, see `groups`."""
    return transformation_of(Frozen())


@final
@dataclass(frozen=True, eq=False)
class Frozen(Rule):
    """The rule of `freeze`."""

    def start(self, params: Any) -> Any:
        return EmptyState()

    def step(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return optree.tree_map(torch.zeros_like, grads), state

    def on_vector(self, like: Any) -> Frozen:
        return self


def check_transformation(name: str, value: Any) -> None:
    """Raise `ConfigurationError` unless `value` has TorchOpt's protocol."""
    if not hasattr(value, "init") or not hasattr(value, "update"):
        raise ConfigurationError(
            f"{name} is a {type(value).__name__}; it must be a gradient transformation such as "
            "bilevel.optim.sgd(0.1)"
        )
