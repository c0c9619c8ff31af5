"""Adam, with coupled and with decoupled weight decay."""

from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from bilevel.errors import ConfigurationError
from bilevel.optim.shared import (
    Number,
    add_decay,
    check,
    check_decay,
    is_zero,
    map_tree,
    needed,
    zeros_like,
)


class AdamState(NamedTuple):
    """The step count, and moving averages of the gradient and of its square."""

    step: Tensor
    mean: Any
    square: Any


def adam(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    eps_root: Number = 1e-12,
    weight_decay: Number = 0.0,
) -> GradientTransformation:
    r"""Adam, as `torch.optim.Adam` when `eps_root=0`.

    m ← β₁m + (1−β₁)g;   v ← β₂v + (1−β₂)g²;   θ ← θ − lr·m̂ / (√(v̂ + eps_root) + eps)

    with m̂ = m/(1−β₁ᵗ), v̂ = v/(1−β₂ᵗ).

    Args:
        lr: Step size, at least 0.
        betas: Decay rates of the two averages, each in [0, 1).
        eps: Added to the denominator, at least 0.
        eps_root: Added under the root, at least 0; see `bilevel.optim`.
        weight_decay: L2 penalty added to the gradient, at least 0.

    Raises:
        ConfigurationError: A number outside its range.

    Source: Kingma and Ba, arXiv 1412.6980.
    """
    check(weight_decay=weight_decay)
    return _adam(lr, betas, eps, eps_root, coupled_decay=weight_decay, decoupled_decay=0.0)


def adamw(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    eps_root: Number = 1e-12,
    weight_decay: Number = 1e-2,
) -> GradientTransformation:
    """Adam with decoupled weight decay, θ ← θ − lr·weight_decay·θ beside `adam`'s step.

    As `torch.optim.AdamW` when `eps_root=0`; arguments and errors as for `adam`.

    Source: Loshchilov and Hutter, arXiv 1711.05101.
    """
    check(weight_decay=weight_decay)
    return _adam(lr, betas, eps, eps_root, coupled_decay=0.0, decoupled_decay=weight_decay)


def _adam(
    lr: Number,
    betas: tuple[Number, Number],
    eps: Number,
    eps_root: Number,
    *,
    coupled_decay: Number,
    decoupled_decay: Number,
) -> GradientTransformation:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ConfigurationError(f"betas={betas!r}: it must be a pair of numbers")
    beta1, beta2 = betas
    check(lr=lr, eps=eps, eps_root=eps_root)
    check_decay(beta1=beta1, beta2=beta2)

    def init(params: Any) -> AdamState:
        first = optree.tree_leaves(params)[0]
        count = torch.zeros((), dtype=torch.int64, device=first.device)
        return AdamState(count, zeros_like(params), zeros_like(params))

    def update(
        updates: Any, state: AdamState, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, AdamState]:
        grads = add_decay(updates, params, coupled_decay)
        count = state.step + 1
        mean = map_tree(lambda m, g: beta1 * m + (1 - beta1) * g, state.mean, grads)
        square = map_tree(lambda v, g: beta2 * v + (1 - beta2) * (g * g), state.square, grads)

        def step(m: Tensor, v: Tensor) -> Tensor:
            # An integer power of a Python number would be taken in the default dtype.
            t = count.to(m.dtype)
            root = torch.sqrt(v / (1 - beta2**t) + eps_root)
            return -(lr / (1 - beta1**t)) * m / (root + eps)

        updates = map_tree(step, mean, square)
        if not is_zero(decoupled_decay):
            updates = map_tree(lambda u, p: u - lr * decoupled_decay * p, updates, needed(params))
        return updates, AdamState(count, mean, square)

    return GradientTransformation(init, update)
