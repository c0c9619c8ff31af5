"""What the optimizers share: checked hyperparameters, and arithmetic over pytrees."""

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.errors import ConfigurationError

#: A hyperparameter: a Python number, or a tensor that broadcasts against the parameters.
Number = float | Tensor


def map_tree(function: Callable[..., Tensor], *trees: Any) -> Any:
    return optree.tree_map(function, *trees)


def zeros_like(params: Any) -> Any:
    return map_tree(torch.zeros_like, params)


def add_decay(grads: Any, params: Any, weight_decay: Number) -> Any:
    if is_zero(weight_decay):
        return grads
    return map_tree(lambda g, p: g + weight_decay * p, grads, needed(params))


def needed(params: Any) -> Any:
    if params is None:
        raise ConfigurationError("weight decay needs update(..., params=params)")
    return params


def is_zero(value: Number) -> bool:
    """Whether a hyperparameter is the number 0; a tensor never is, it may be differentiated."""
    return not isinstance(value, Tensor) and value == 0


def check(**hyperparameters: Number) -> None:
    for name, value in hyperparameters.items():
        if not isinstance(value, Tensor) and not (_is_number(value) and value >= 0):
            raise ConfigurationError(f"{name}={value!r}: it must be a number of at least 0")


def check_decay(**hyperparameters: Number) -> None:
    for name, value in hyperparameters.items():
        if not isinstance(value, Tensor) and not (_is_number(value) and 0 <= value < 1):
            raise ConfigurationError(f"{name}={value!r}: it must be a number in [0, 1)")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
