r"""Differentiable optimizers as gradient transformations in TorchOpt's protocol.

Each function returns a `torchopt.base.GradientTransformation`: a pair of pure functions
`init(params)` and `update(grads, state, *, params, inplace)`, over any pytree of tensors. They
chain with TorchOpt's own (`torchopt.chain`). Unlike those, they never write in place (`inplace` is
accepted and has no effect), so they are safe under `torch.func` transforms and `torch.compile`,
and every hyperparameter may be a tensor: a scalar, or anything that broadcasts against the
parameters, with a gradient if it has to be learned.

With `eps_root=0` each takes the same steps as its namesake in `torch.optim`. A square root has an
infinite derivative at zero, so to differentiate through a step in which some gradient may vanish
`eps_root` must be positive; the default of 1e-12 changes only coordinates whose gradients are
below about 1e-6.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torchopt.base import EmptyState, GradientTransformation

from bilevel.errors import ConfigurationError

Number = float | Tensor


class SGDState(NamedTuple):
    """The momentum buffer, a pytree like the parameters."""

    momentum: Any


class AdamState(NamedTuple):
    """The step count, and moving averages of the gradient and of its square."""

    step: Tensor
    mean: Any
    square: Any


class RMSPropState(NamedTuple):
    """Moving averages of the squared gradient, of the gradient, and of the step."""

    square: Any
    mean: Any
    momentum: Any


class AdagradState(NamedTuple):
    """The sum of squared gradients."""

    total: Any


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

    Example:
        >>> optimizer = bilevel.optim.sgd(lr=0.1, momentum=0.9)
        >>> params = torch.ones(2)
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(torch.tensor([1.0, 2.0]), state, params=params)
        >>> params + updates
        tensor([0.9000, 0.8000])
    """
    _check(lr=lr, weight_decay=weight_decay)
    _check_decay(momentum=momentum)
    has_momentum = isinstance(momentum, Tensor) or momentum != 0
    if nesterov and not has_momentum:
        raise ConfigurationError("nesterov=True needs a momentum above 0")

    def init(params: Any) -> Any:
        return SGDState(_zeros_like(params)) if has_momentum else EmptyState()

    def update(
        updates: Any, state: Any, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, Any]:
        grads = _add_decay(updates, params, weight_decay)
        if has_momentum:
            velocity = _map(lambda v, g: momentum * v + g, state.momentum, grads)
            state = SGDState(velocity)
            grads = _map(lambda g, v: g + momentum * v, grads, velocity) if nesterov else velocity
        return _map(lambda g: -lr * g, grads), state

    return GradientTransformation(init, update)


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
        eps_root: Added under the root, at least 0; see the module's text.
        weight_decay: L2 penalty added to the gradient, at least 0.

    Raises:
        ConfigurationError: A number outside its range.

    Source: Kingma and Ba, arXiv 1412.6980.
    """
    _check(weight_decay=weight_decay)
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
    _check(weight_decay=weight_decay)
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
    _check(lr=lr, eps=eps, eps_root=eps_root)
    _check_decay(beta1=beta1, beta2=beta2)

    def init(params: Any) -> AdamState:
        first = optree.tree_leaves(params)[0]
        count = torch.zeros((), dtype=torch.int64, device=first.device)
        return AdamState(count, _zeros_like(params), _zeros_like(params))

    def update(
        updates: Any, state: AdamState, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, AdamState]:
        grads = _add_decay(updates, params, coupled_decay)
        count = state.step + 1
        mean = _map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mean, grads)
        square = _map(lambda v, g: beta2 * v + (1 - beta2) * (g * g), state.square, grads)

        def step(m: Tensor, v: Tensor) -> Tensor:
            # An integer power of a Python number would be taken in the default dtype.
            t = count.to(m.dtype)
            root = torch.sqrt(v / (1 - beta2**t) + eps_root)
            return -(lr / (1 - beta1**t)) * m / (root + eps)

        updates = _map(step, mean, square)
        if not _is_zero(decoupled_decay):
            updates = _map(lambda u, p: u - lr * decoupled_decay * p, updates, _needed(params))
        return updates, AdamState(count, mean, square)

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
        eps_root: Added under the root, at least 0; see the module's text.
        weight_decay: L2 penalty added to the gradient, at least 0.
        momentum: In [0, 1).
        centered: Use the variance v − (moving average of g)² in place of v.

    Raises:
        ConfigurationError: A number outside its range.
    """
    _check(lr=lr, eps=eps, eps_root=eps_root, weight_decay=weight_decay)
    _check_decay(alpha=alpha, momentum=momentum)

    def init(params: Any) -> RMSPropState:
        return RMSPropState(_zeros_like(params), _zeros_like(params), _zeros_like(params))

    def update(
        updates: Any, state: RMSPropState, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, RMSPropState]:
        grads = _add_decay(updates, params, weight_decay)
        square = _map(lambda v, g: alpha * v + (1 - alpha) * (g * g), state.square, grads)
        mean, variance = state.mean, square
        if centered:
            mean = _map(lambda m, g: alpha * m + (1 - alpha) * g, state.mean, grads)
            variance = _map(lambda v, m: v - m * m, square, mean)
        scaled = _map(lambda g, v: g / (torch.sqrt(v + eps_root) + eps), grads, variance)
        buffer = _map(lambda b, s: momentum * b + s, state.momentum, scaled)
        return _map(lambda b: -lr * b, buffer), RMSPropState(square, mean, buffer)

    return GradientTransformation(init, update)


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
        eps_root: Added under the root, at least 0; see the module's text.
        weight_decay: L2 penalty added to the gradient, at least 0.
        initial_accumulator_value: G before the first step, at least 0.

    Raises:
        ConfigurationError: A number outside its range.
    """
    _check(lr=lr, eps=eps, eps_root=eps_root, weight_decay=weight_decay)
    _check(initial_accumulator_value=initial_accumulator_value)

    def init(params: Any) -> AdagradState:
        return AdagradState(_map(lambda p: torch.full_like(p, initial_accumulator_value), params))

    def update(
        updates: Any, state: AdagradState, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, AdagradState]:
        grads = _add_decay(updates, params, weight_decay)
        total = _map(lambda s, g: s + g * g, state.total, grads)
        updates = _map(lambda g, s: -lr * g / (torch.sqrt(s + eps_root) + eps), grads, total)
        return updates, AdagradState(total)

    return GradientTransformation(init, update)


def _map(function: Callable[..., Tensor], *trees: Any) -> Any:
    return optree.tree_map(function, *trees)


def _zeros_like(params: Any) -> Any:
    return _map(torch.zeros_like, params)


def _add_decay(grads: Any, params: Any, weight_decay: Number) -> Any:
    if _is_zero(weight_decay):
        return grads
    return _map(lambda g, p: g + weight_decay * p, grads, _needed(params))


def _needed(params: Any) -> Any:
    if params is None:
        raise ConfigurationError("weight decay needs update(..., params=params)")
    return params


def _is_zero(value: Number) -> bool:
    """Whether a hyperparameter is the number 0; a tensor never is, it may be differentiated."""
    return not isinstance(value, Tensor) and value == 0


def _check(**hyperparameters: Number) -> None:
    for name, value in hyperparameters.items():
        if not isinstance(value, Tensor) and not (_is_number(value) and value >= 0):
            raise ConfigurationError(f"{name}={value!r}: it must be a number of at least 0")


def _check_decay(**hyperparameters: Number) -> None:
    for name, value in hyperparameters.items():
        if not isinstance(value, Tensor) and not (_is_number(value) and 0 <= value < 1):
            raise ConfigurationError(f"{name}={value!r}: it must be a number in [0, 1)")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
