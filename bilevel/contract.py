"""What the methods of a problem may return, checked wherever they are called."""

from collections.abc import Mapping
from typing import Any

import optree
from torch import Tensor

from bilevel.errors import ProblemError
from bilevel.tree import is_differentiable, named_leaves


def check_params(params: Any) -> None:
    """Raise `ProblemError` unless `params` are floating-point tensors, all of one dtype."""
    leaves = named_leaves(params)
    for name, leaf in leaves:
        if not is_differentiable(leaf):
            raise ProblemError(
                f"init returned {_kind(leaf)} at {name!r}; parameters must be floating-point "
                "tensors"
            )
    dtypes = {leaf.dtype for _, leaf in leaves}
    if len(dtypes) != 1:
        raise ProblemError(
            f"init returned parameters of dtypes {sorted(map(str, dtypes))}; there must be "
            "at least one parameter, and all of one dtype"
        )


def check_scalar(value: Any, name: str) -> Tensor:
    """`value`, or `ProblemError` unless it is a floating-point scalar tensor."""
    if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
        raise ProblemError(
            f"{name} returned {_kind(value)}; it must be a floating-point scalar tensor"
        )
    return value


def check_hyperparameters(values: Any) -> dict[str, Any]:
    """`values` as a dict, or `ProblemError` unless each is a tensor or a pytree of tensors."""
    if not isinstance(values, Mapping):
        raise ProblemError(
            f'hyperparameters returned {_kind(values)}; it must be a dict by name, as {{"lr": ...}}'
        )
    for name, value in values.items():
        leaves = [value] if isinstance(value, Tensor) else optree.tree_leaves(value)
        wrong = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        if wrong or not leaves:
            kind = _kind(wrong[0]) if wrong else "nothing"
            raise ProblemError(
                f"hyperparameters()[{name!r}] holds {kind}; it must be a tensor, or a pytree of "
                "tensors like the parameters"
            )
    return dict(values)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
