"""Stochastic gradient descent."""

from typing import Any, NamedTuple

from torch import Tensor
from torchopt.base import EmptyState, GradientTransformation

from bilevel.errors import ConfigurationError
from bilevel.optim.shared import Number, add_decay, check, check_decay, map_tree, zeros_like


class SGDState(NamedTuple):
    """The momentum buffer, a pytree like the parameters."""

    momentum: Any


def sgd(
    lr: Number, momentum: Number = 0.0, weight_decay: Number = 0.0, nesterov: bool = False
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
    check(lr=lr, weight_decay=weight_decay)
    check_decay(momentum=momentum)
    has_momentum = isinstance(momentum, Tensor) or momentum != 0
    if nesterov and not has_momentum:
        raise ConfigurationError("nesterov=True needs a momentum above 0")

    def init(params: Any) -> Any:
        return SGDState(zeros_like(params)) if has_momentum else EmptyState()

    def update(
        updates: Any, state: Any, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, Any]:
        grads = add_decay(updates, params, weight_decay)
        if has_momentum:
            velocity = map_tree(lambda v, g: momentum * v + g, state.momentum, grads)
            state = SGDState(velocity)
            grads = (
                map_tree(lambda g, v: g + momentum * v, grads, velocity) if nesterov else velocity
            )
        return map_tree(lambda g: -lr * g, grads), state

    return GradientTransformation(init, update)
