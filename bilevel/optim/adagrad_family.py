"""Optimizers that divide by the root of accumulated squared gradients."""

from typing import Any, NamedTuple

import torch
from torchopt.base import GradientTransformation

from bilevel.optim.shared import Number, add_decay, check, check_decay, map_tree, zeros_like


class AdagradState(NamedTuple):
    """The sum of squared gradients."""

    total: Any


class RMSPropState(NamedTuple):
    """Moving averages of the squared gradient, of the gradient, and of the step."""

    square: Any
    mean: Any
    momentum: Any


def adagrad(
    lr: Number = 1e-2,
    eps: Number = 1e-10,
    eps_root: Number = 1e-12,
    weight_decay: Number = 0.0,
    initial_accumulator_value: float = 0.0,
) -> GradientTransformation:
    r"""Adagrad, as `torch.optim.Adagrad` when `eps_root=0`.

    G ← G + g²;   θ ← θ − lr·g / (√(G + eps_root) + eps)

    Args:
        lr: Step size, at least 0.
        eps: Added to the denominator, at least 0.
        eps_root: Added under the root, at least 0; see `bilevel.optim`.
        weight_decay: L2 penalty added to the gradient, at least 0.
        initial_accumulator_value: G before the first step, at least 0.

    Raises:
        ConfigurationError: A number outside its range.
    """
    check(lr=lr, eps=eps, eps_root=eps_root, weight_decay=weight_decay)
    check(initial_accumulator_value=initial_accumulator_value)

    def init(params: Any) -> AdagradState:
        return AdagradState(
            map_tree(lambda p: torch.full_like(p, initial_accumulator_value), params)
        )

    def update(
        updates: Any, state: AdagradState, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, AdagradState]:
        grads = add_decay(updates, params, weight_decay)
        total = map_tree(lambda s, g: s + g * g, state.total, grads)
        updates = map_tree(lambda g, s: -lr * g / (torch.sqrt(s + eps_root) + eps), grads, total)
        return updates, AdagradState(total)

    return GradientTransformation(init, update)


def rmsprop(
    lr: Number = 1e-2,
    alpha: Number = 0.99,
    eps: Number = 1e-8,
    eps_root: Number = 1e-12,
    weight_decay: Number = 0.0,
    momentum: Number = 0.0,
    centered: bool = False,
) -> GradientTransformation:
    r"""RMSProp, as `torch.optim.RMSprop` when `eps_root=0`.

    v ← αv + (1−α)g²;   b ← momentum·b + g / (√(v + eps_root) + eps);   θ ← θ − lr·b

    Args:
        lr: Step size, at least 0.
        alpha: Decay rate of the averages, in [0, 1).
        eps: Added to the denominator, at least 0.
        eps_root: Added under the root, at least 0; see `bilevel.optim`.
        weight_decay: L2 penalty added to the gradient, at least 0.
        momentum: In [0, 1).
        centered: Use the variance v − (moving average of g)² in place of v.

    Raises:
        ConfigurationError: A number outside its range.
    """
    check(lr=lr, eps=eps, eps_root=eps_root, weight_decay=weight_decay)
    check_decay(alpha=alpha, momentum=momentum)

    def init(params: Any) -> RMSPropState:
        return RMSPropState(zeros_like(params), zeros_like(params), zeros_like(params))

    def update(
        updates: Any, state: RMSPropState, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, RMSPropState]:
        grads = add_decay(updates, params, weight_decay)
        square = map_tree(lambda v, g: alpha * v + (1 - alpha) * (g * g), state.square, grads)
        mean, variance = state.mean, square
        if centered:
            mean = map_tree(lambda m, g: alpha * m + (1 - alpha) * g, state.mean, grads)
            variance = map_tree(lambda v, m: v - m * m, square, mean)
        scaled = map_tree(lambda g, v: g / (torch.sqrt(v + eps_root) + eps), grads, variance)
        buffer = map_tree(lambda b, s: momentum * b + s, state.momentum, scaled)
        return map_tree(lambda b: -lr * b, buffer), RMSPropState(square, mean, buffer)

    return GradientTransformation(init, update)
