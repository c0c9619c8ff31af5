"""What our optimizers have in common: pure steps over any pytree, or over one flat vector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, Self, final

import optree
import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from bilevel.errors import ConfigurationError
from bilevel.optim.hyperparameters import Hyperparameter, is_scalar, per_leaf, raveled

#: Dtypes in which a parameter is rounded by more than a step moves it.
LOW_PRECISION = (torch.float16, torch.bfloat16)


class RoundedState(NamedTuple):
    """The state for 16-bit parameters: the rule runs in float32, on θ + `remainder`.

    Attributes:
        remainder: What rounding cut off each parameter so far, in float32, a pytree like them.
        state: The rule's own state, in float32.
    """

    remainder: Any
    state: Any


class Rule(ABC):
    """An optimizer: what to add to the parameters for a gradient. A pure function of its state.

    `init` and `update` are TorchOpt's protocol. Subclasses say in `start` and `step` what happens
    to parameters of at least 32 bits. For those of 16 bits the rule is run on a master copy in
    float32, which is kept as the parameters and what rounding cut off them:

        Θ = θ + r;   Θ ← Θ + step(∇ℓ(θ), Θ);   θ ← Θ rounded to 16 bits;   r ← Θ − θ

    so a step too small for θ to move adds up in r until it does. As in all of PyTorch, the
    derivative of rounding is taken to be 1.
    """

    @abstractmethod
    def start(self, params: Any) -> Any:
        """The first state."""

    @abstractmethod
    def step(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        """(what is added to the parameters, the next state)."""

    @abstractmethod
    def on_vector(self, like: Any) -> Self | None:
        """The rule that does to raveled parameters what this one does to a pytree like `like`.

        None where there is none, because the rule looks at the leaves.
        """

    @final
    def init(self, params: Any) -> Any:
        if not _is_low(params):
            return self.start(params)
        wide = optree.tree_map(_widened, params)
        return RoundedState(optree.tree_map(torch.zeros_like, wide), self.start(wide))

    @final
    def update(
        self, updates: Any, state: Any, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, Any]:
        if not isinstance(state, RoundedState):
            return self.step(updates, state, params)
        if params is None:
            raise ConfigurationError("parameters of 16 bits need update(..., params=params)")
        master = optree.tree_map(lambda p, r: _widened(p) + r, params, state.remainder)
        changes, inner = self.step(optree.tree_map(_widened, updates), state.state, master)
        master = optree.tree_map(torch.add, master, changes)
        updates = optree.tree_map(lambda new, p: new.to(p.dtype) - p, master, params)
        # Not `new.to(p.dtype)`: a difference far from p is itself rounded.
        remainder = optree.tree_map(
            lambda new, p, u: new - _widened(p + u), master, params, updates
        )
        return updates, RoundedState(remainder, inner)


@dataclass(frozen=True, eq=False)
class Elementwise(Rule):
    """A rule that treats every entry of the parameters on its own.

    Every field that is no flag is a hyperparameter; it may be a pytree like the parameters.
    """

    def on_vector(self, like: Any) -> Self:
        changed = {name: raveled(name, value, like) for name, value in self._not_scalar.items()}
        return replace(self, **changed) if changed else self

    def each(
        self,
        formula: Callable[..., tuple[Tensor, ...]],
        grads: Any,
        params: Any,
        moments: Sequence[Any] = (),
        *shared: Any,
    ) -> tuple[Any, list[Any]]:
        """`formula` for every leaf: (the pytree of updates, those of the new moments).

        Args:
            formula: Of (this rule with the hyperparameters of one leaf, its gradient, its
                parameters or None, its moments …, `shared` …) gives (the update, its moments …).
            grads: The gradients.
            params: The parameters, or None.
            moments: Pytrees like the gradients.
            shared: Arguments that are the same for every leaf.
        """
        if isinstance(grads, Tensor):
            (rule,) = self._for_leaves(grads, 1)
            update, *after = _like(grads, formula(rule, grads, params, *moments, *shared))
            return update, after
        leaves, spec = optree.tree_flatten(grads)
        columns = [spec.flatten_up_to(moment) for moment in moments]
        thetas = [None] * len(leaves) if params is None else spec.flatten_up_to(params)
        rows = [
            _like(grad, formula(rule, grad, theta, *own, *shared))
            for rule, grad, theta, *own in zip(
                self._for_leaves(grads, len(leaves)), leaves, thetas, *columns, strict=True
            )
        ]
        trees = [optree.tree_unflatten(spec, column) for column in zip(*rows, strict=True)]
        return trees[0], trees[1:]

    @cached_property
    def _not_scalar(self) -> dict[str, Any]:
        """The hyperparameters that may differ from one parameter to another."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if not is_scalar(value)}

    def _for_leaves(self, like: Any, count: int) -> list[Self]:
        """This rule with the hyperparameters of each leaf."""
        if not self._not_scalar:
            return [self] * count
        values = {name: per_leaf(name, value, like) for name, value in self._not_scalar.items()}
        return [
            replace(self, **dict(zip(values, row, strict=True)))
            for row in zip(*values.values(), strict=True)
        ]


def on_vector(transformation: Any, like: Any) -> GradientTransformation | None:
    """What `transformation` does to a pytree, done to the one vector that it ravels to.

    The vector has the leaves of `like` in the order of `optree.tree_leaves`, each raveled. Every
    hyperparameter that is a pytree becomes a vector too, differentiably; scalars stay scalars.

    Args:
        transformation: Any gradient transformation.
        like: The parameters, a pytree of tensors.

    Returns:
        The vector form; None for a transformation that must see the pytree, as `groups` must and
        whatever is not from `bilevel.optim` may.

    Raises:
        ConfigurationError: A hyperparameter does not fit the parameters.
    """
    rule = rule_of(transformation)
    rule = None if rule is None else rule.on_vector(like)
    return None if rule is None else transformation_of(rule)


def transformation_of(rule: Rule) -> GradientTransformation:
    """A rule in TorchOpt's protocol."""
    return GradientTransformation(rule.init, rule.update)


def rule_of(transformation: Any) -> Rule | None:
    """The rule behind a transformation, if it is one of ours."""
    owner = getattr(getattr(transformation, "update", None), "__self__", None)
    return owner if isinstance(owner, Rule) else None


def zeros_like(params: Any) -> Any:
    return optree.tree_map(torch.zeros_like, params)


def is_zero(value: Hyperparameter) -> bool:
    """Whether a hyperparameter is the number 0; a tensor never is, it may be differentiated."""
    return isinstance(value, (int, float)) and value == 0


def decayed(grad: Tensor, param: Tensor | None, weight_decay: float | Tensor) -> Tensor:
    """The gradient with that of an L2 penalty."""
    return grad if is_zero(weight_decay) else grad + weight_decay * needed(param)


def needed(param: Tensor | None) -> Tensor:
    if param is None:
        raise ConfigurationError("weight decay needs update(..., params=params)")
    return param


def _like(grad: Tensor, values: tuple[Tensor, ...]) -> list[Tensor]:
    """A hyperparameter of a wider dtype must not widen the parameters."""
    return [value if value.dtype == grad.dtype else value.to(grad.dtype) for value in values]


def _is_low(params: Any) -> bool:
    return any(leaf.dtype in LOW_PRECISION for leaf in optree.tree_leaves(params))


def _widened(leaf: Tensor) -> Tensor:
    return leaf.float() if leaf.dtype in LOW_PRECISION else leaf
