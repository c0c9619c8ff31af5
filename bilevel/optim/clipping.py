"""Bounds on the gradient that are differentiated, to be chained with an optimizer."""

from dataclasses import dataclass
from typing import Any, Self, final

import optree
import torch
from torch import Tensor
from torchopt.base import EmptyState, GradientTransformation

from bilevel.errors import ConfigurationError
from bilevel.optim.base import Elementwise, Rule, transformation_of
from bilevel.optim.hyperparameters import Hyperparameter, above_zero, is_scalar


def clip_by_norm(max_norm: float | Tensor) -> GradientTransformation:
    r"""The gradient, scaled down to a norm of at most `max_norm`, taken over all parameters.

    g ← g · min(1, max_norm / ‖g‖₂)

    The norm is differentiated: dg is projected on the sphere where the clip is active. At g = 0
    the derivative is that of g itself. `torch.nn.utils.clip_grad_norm_` adds 1e-6 to the norm.

    Args:
        max_norm: Above 0; a number or a scalar tensor, which may be learned.

    Raises:
        ConfigurationError: It is neither, or not above 0.

    Source: Pascanu, Mikolov and Bengio, arXiv 1211.5063.

    Example:
        >>> clip = bilevel.optim.clip_by_norm(1.0)
        >>> gradient = torch.tensor([3.0, 4.0])
        >>> clip.update(gradient, clip.init(gradient))[0]
        tensor([0.6000, 0.8000])
    """
    max_norm = above_zero("max_norm", max_norm)
    if not is_scalar(max_norm):
        raise ConfigurationError(
            "max_norm is a pytree or a tensor of several entries: one norm is taken over all "
            "parameters, so it must be one number; for a norm of each part, use groups"
        )
    return transformation_of(ClipByNorm(max_norm))


def clip_by_value(bound: Hyperparameter) -> GradientTransformation:
    r"""The gradient with every entry brought into [−bound, bound].

    Its derivative is 1 where |g| ≤ bound and 0 beyond; by the bound it is ±1 beyond.

    Args:
        bound: Above 0.

    Raises:
        ConfigurationError: A number not above 0.

    Example:
        >>> clip = bilevel.optim.clip_by_value(1.0)
        >>> gradient = torch.tensor([3.0, -0.5])
        >>> clip.update(gradient, clip.init(gradient))[0]
        tensor([ 1.0000, -0.5000])
    """
    return transformation_of(ClipByValue(above_zero("bound", bound)))


@final
@dataclass(frozen=True, eq=False)
class ClipByNorm(Rule):
    """The rule of `clip_by_norm`; `eps` is added to the norm, as `torch.nn.utils` does."""

    max_norm: float | Tensor
    eps: float = 0.0

    def start(self, params: Any) -> Any:
        return EmptyState()

    def step(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        leaves, spec = optree.tree_flatten(grads)
        # Squares of what is divided by the largest can neither overflow nor all vanish.
        largest = torch.stack([leaf.detach().abs().amax() for leaf in leaves if leaf.numel()]).max()
        scale = torch.where(largest > 0, largest, 1)
        scaled = [leaf / scale for leaf in leaves]
        squared = torch.stack([leaf.square().sum() for leaf in scaled]).sum()
        # The root of 0 has no derivative, not even where it is not used.
        norm = torch.where(largest > 0, squared, 1).sqrt()
        factor = self.max_norm / (norm + self.eps / scale if self.eps else norm)
        active = (largest > 0) & (scale * norm + self.eps > self.max_norm)
        clipped = [
            torch.where(active, (unit * factor).to(leaf.dtype), leaf)
            for unit, leaf in zip(scaled, leaves, strict=True)
        ]
        return optree.tree_unflatten(spec, clipped), state

    def on_vector(self, like: Any) -> Self:
        return self


@final
@dataclass(frozen=True, eq=False)
class ClipByValue(Elementwise):
    """The rule of `clip_by_value`."""

    bound: Hyperparameter

    def start(self, params: Any) -> Any:
        return EmptyState()

    def step(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return self.each(ClipByValue._one, grads, params)[0], state

    def _one(self, grad: Tensor, param: Tensor | None) -> tuple[Tensor, ...]:
        return (torch.where(grad.abs() > self.bound, grad.sign() * self.bound, grad),)
