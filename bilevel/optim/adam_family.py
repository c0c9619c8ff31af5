"""Adam, with coupled and with decoupled weight decay."""

from dataclasses import dataclass
from typing import Any, NamedTuple, final

import optree
import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from bilevel.errors import ConfigurationError
from bilevel.optim.base import Elementwise, decayed, is_zero, needed, transformation_of, zeros_like
from bilevel.optim.hyperparameters import Hyperparameter, at_least_zero, decay_rate


class AdamState(NamedTuple):
    """The step count, and unbiased moving averages of the gradient and of its square."""

    step: Tensor
    mean: Any
    square: Any


def adam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    eps_root: Hyperparameter = 1e-12,
    weight_decay: Hyperparameter = 0.0,
) -> GradientTransformation:
    r"""Adam, as `torch.optim.Adam` when `eps_root=0`.

    m̂ ← m̂ + w(β₁)(g − m̂);   v̂ ← v̂ + w(β₂)(g² − v̂);   θ ← θ − lr·m̂ / (√(v̂ + eps_root) + eps)

    with w(β) = (1−β)/(1−βᵗ) in float64. These are the paper's m/(1−β₁ᵗ) and v/(1−β₂ᵗ), in which
    the derivative by a β would be a difference of large numbers.

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
    return transformation_of(_adam(lr, betas, eps, eps_root, weight_decay, decoupled=False))


def adamw(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    eps_root: Hyperparameter = 1e-12,
    weight_decay: Hyperparameter = 1e-2,
) -> GradientTransformation:
    """Adam with decoupled weight decay, θ ← θ − lr·weight_decay·θ beside `adam`'s step.

    As `torch.optim.AdamW` when `eps_root=0`; arguments and errors as for `adam`.

    Source: Loshchilov and Hutter, arXiv 1711.05101.
    """
    return transformation_of(_adam(lr, betas, eps, eps_root, weight_decay, decoupled=True))


def _adam(
    lr: Hyperparameter,
    betas: tuple[Hyperparameter, Hyperparameter],
    eps: Hyperparameter,
    eps_root: Hyperparameter,
    weight_decay: Hyperparameter,
    *,
    decoupled: bool,
) -> "Adam":
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ConfigurationError(f"betas={betas!r}: it must be a pair of numbers")
    return Adam(
        at_least_zero("lr", lr),
        decay_rate("beta1", betas[0]),
        decay_rate("beta2", betas[1]),
        at_least_zero("eps", eps),
        at_least_zero("eps_root", eps_root),
        at_least_zero("weight_decay", weight_decay),
        decoupled,
    )


@final
@dataclass(frozen=True, eq=False)
class Adam(Elementwise):
    """The rule of `adam`, and with `decoupled` that of `adamw`."""

    lr: Hyperparameter
    beta1: Hyperparameter
    beta2: Hyperparameter
    eps: Hyperparameter
    eps_root: Hyperparameter
    weight_decay: Hyperparameter
    decoupled: bool

    def start(self, params: Any) -> AdamState:
        first = optree.tree_leaves(params)[0]
        count = torch.zeros((), dtype=torch.int64, device=first.device)
        return AdamState(count, zeros_like(params), zeros_like(params))

    def step(self, grads: Any, state: AdamState, params: Any) -> tuple[Any, AdamState]:
        count = state.step + 1
        updates, (mean, square) = self.each(
            Adam._one, grads, params, (state.mean, state.square), count.double()
        )
        return updates, AdamState(count, mean, square)

    def _one(
        self, grad: Tensor, param: Tensor | None, mean: Tensor, square: Tensor, count: Tensor
    ) -> tuple[Tensor, ...]:
        if not self.decoupled:
            grad = decayed(grad, param, self.weight_decay)
        mean = mean + _weight(self.beta1, count) * (grad - mean)
        square = square + _weight(self.beta2, count) * (grad * grad - square)
        update = -self.lr * mean / (torch.sqrt(square + self.eps_root) + self.eps)
        if self.decoupled and not is_zero(self.weight_decay):
            update = update - self.lr * self.weight_decay * needed(param)
        return update, mean, square


def _weight(beta: float | Tensor, count: Tensor) -> Tensor:
    """(1−β)/(1−βᵗ) in float64, since in fewer digits nearly all of 1−βᵗ would cancel."""
    beta = beta.double() if isinstance(beta, Tensor) else beta
    return (1 - beta) / (1 - torch.pow(beta, count))
