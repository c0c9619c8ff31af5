"""Stochastic gradient descent."""

from dataclasses import dataclass
from typing import Any, NamedTuple, final

from torch import Tensor
from torchopt.base import EmptyState, GradientTransformation

from bilevel.checks import check_flag
from bilevel.errors import ConfigurationError
from bilevel.optim.base import Elementwise, decayed, is_zero, transformation_of, zeros_like
from bilevel.optim.hyperparameters import Hyperparameter, at_least_zero, decay_rate


class SGDState(NamedTuple):
    """The momentum buffer, a pytree like the parameters."""

    momentum: Any


def sgd(
    lr: Hyperparameter,
    momentum: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    nesterov: bool = False,
) -> GradientTransformation:
    r"""Stochastic gradient descent, as `torch.optim.SGD`.

    g ← g + weight_decay·θ;   v ← momentum·v + g;   θ ← θ − lr·v   (Nesterov: lr·(g + momentum·v))

    Args:
        lr: Step size, at least 0.
        momentum: In [0, 1).
        weight_decay: L2 penalty added to the gradient, at least 0.
        nesterov: Look ahead by one momentum step; needs momentum.

    Raises:
        ConfigurationError: A number outside its range.
    """
    rule = SGD(
        at_least_zero("lr", lr),
        decay_rate("momentum", momentum),
        at_least_zero("weight_decay", weight_decay),
        check_flag("nesterov", nesterov),
    )
    if nesterov and is_zero(rule.momentum):
        raise ConfigurationError("nesterov=True needs a momentum above 0")
    return transformation_of(rule)


@final
@dataclass(frozen=True, eq=False)
class SGD(Elementwise):
    """The rule of `sgd`."""

    lr: Hyperparameter
    momentum: Hyperparameter
    weight_decay: Hyperparameter
    nesterov: bool

    def start(self, params: Any) -> Any:
        return EmptyState() if is_zero(self.momentum) else SGDState(zeros_like(params))

    def step(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        if isinstance(state, EmptyState):
            return self.each(SGD._plain, grads, params)[0], state
        updates, moments = self.each(SGD._with_momentum, grads, params, state)
        return updates, SGDState(*moments)

    def _plain(self, grad: Tensor, param: Tensor | None) -> tuple[Tensor, ...]:
        return (-self.lr * decayed(grad, param, self.weight_decay),)

    def _with_momentum(
        self, grad: Tensor, param: Tensor | None, velocity: Tensor
    ) -> tuple[Tensor, ...]:
        grad = decayed(grad, param, self.weight_decay)
        velocity = self.momentum * velocity + grad
        ahead = grad + self.momentum * velocity if self.nesterov else velocity
        return -self.lr * ahead, velocity
