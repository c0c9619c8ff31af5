"""Optimizers that divide by the root of accumulated squared gradients."""

from dataclasses import dataclass
from typing import Any, NamedTuple, final

import optree
import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from bilevel.checks import check_flag
from bilevel.optim.base import Elementwise, decayed, transformation_of, zeros_like
from bilevel.optim.hyperparameters import Hyperparameter, at_least_zero, decay_rate, per_leaf


class AdagradState(NamedTuple):
    """The sum of squared gradients."""

    total: Any


class RMSPropState(NamedTuple):
    """Moving averages: of the squared gradient (or, centred, its variance), gradient, and step."""

    square: Any
    mean: Any
    momentum: Any


def adagrad(
    lr: Hyperparameter = 1e-2,
    eps: Hyperparameter = 1e-10,
    eps_root: Hyperparameter = 1e-12,
    weight_decay: Hyperparameter = 0.0,
    initial_accumulator_value: Hyperparameter = 0.0,
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
    return transformation_of(
        Adagrad(
            at_least_zero("lr", lr),
            at_least_zero("eps", eps),
            at_least_zero("eps_root", eps_root),
            at_least_zero("weight_decay", weight_decay),
            at_least_zero("initial_accumulator_value", initial_accumulator_value),
        )
    )


@final
@dataclass(frozen=True, eq=False)
class Adagrad(Elementwise):
    """The rule of `adagrad`."""

    lr: Hyperparameter
    eps: Hyperparameter
    eps_root: Hyperparameter
    weight_decay: Hyperparameter
    initial_accumulator_value: Hyperparameter

    def start(self, params: Any) -> AdagradState:
        leaves, spec = optree.tree_flatten(params)
        values = per_leaf("initial_accumulator_value", self.initial_accumulator_value, params)
        totals = [
            torch.zeros_like(leaf) + (value.to(leaf) if isinstance(value, Tensor) else value)
            for leaf, value in zip(leaves, values, strict=True)
        ]
        return AdagradState(optree.tree_unflatten(spec, totals))

    def step(self, grads: Any, state: AdagradState, params: Any) -> tuple[Any, AdagradState]:
        updates, moments = self.each(Adagrad._one, grads, params, state)
        return updates, AdagradState(*moments)

    def _one(self, grad: Tensor, param: Tensor | None, total: Tensor) -> tuple[Tensor, ...]:
        grad = decayed(grad, param, self.weight_decay)
        total = total + grad * grad
        return -self.lr * grad / (torch.sqrt(total + self.eps_root) + self.eps), total


def rmsprop(
    lr: Hyperparameter = 1e-2,
    alpha: Hyperparameter = 0.99,
    eps: Hyperparameter = 1e-8,
    eps_root: Hyperparameter = 1e-12,
    weight_decay: Hyperparameter = 0.0,
    momentum: Hyperparameter = 0.0,
    centered: bool = False,
) -> GradientTransformation:
    r"""RMSProp, as `torch.optim.RMSprop` when `eps_root=0`.

    v ← αv + (1−α)g²;   b ← momentum·b + g / (√(v + eps_root) + eps);   θ ← θ − lr·b

    Centred, v is the variance instead: with m ← αm + (1−α)g the difference v − m² follows

        v ← α(v + (1−α)(g − m)²)    (m before its own update)

    which cannot become negative, as the difference of two rounded averages can.

    Args:
        lr: Step size, at least 0.
        alpha: Decay rate of the averages, in [0, 1).
        eps: Added to the denominator, at least 0.
        eps_root: Added under the root, at least 0; see `bilevel.optim`.
        weight_decay: L2 penalty added to the gradient, at least 0.
        momentum: In [0, 1).
        centered: Use the variance of the gradient in place of its square.

    Raises:
        ConfigurationError: A number outside its range.
    """
    return transformation_of(
        RMSProp(
            at_least_zero("lr", lr),
            decay_rate("alpha", alpha),
            at_least_zero("eps", eps),
            at_least_zero("eps_root", eps_root),
            at_least_zero("weight_decay", weight_decay),
            decay_rate("momentum", momentum),
            check_flag("centered", centered),
        )
    )


@final
@dataclass(frozen=True, eq=False)
class RMSProp(Elementwise):
    """The rule of `rmsprop`."""

    lr: Hyperparameter
    alpha: Hyperparameter
    eps: Hyperparameter
    eps_root: Hyperparameter
    weight_decay: Hyperparameter
    momentum: Hyperparameter
    centered: bool

    def start(self, params: Any) -> RMSPropState:
        return RMSPropState(zeros_like(params), zeros_like(params), zeros_like(params))

    def step(self, grads: Any, state: RMSPropState, params: Any) -> tuple[Any, RMSPropState]:
        updates, moments = self.each(RMSProp._one, grads, params, state)
        return updates, RMSPropState(*moments)

    def _one(
        self, grad: Tensor, param: Tensor | None, square: Tensor, mean: Tensor, buffer: Tensor
    ) -> tuple[Tensor, ...]:
        grad = decayed(grad, param, self.weight_decay)
        if self.centered:
            square = self.alpha * (square + (1 - self.alpha) * (grad - mean) ** 2)
            mean = self.alpha * mean + (1 - self.alpha) * grad
        else:
            square = self.alpha * square + (1 - self.alpha) * (grad * grad)
        scaled = grad / (torch.sqrt(square + self.eps_root) + self.eps)
        buffer = self.momentum * buffer + scaled
        return -self.lr * buffer, square, mean, buffer
