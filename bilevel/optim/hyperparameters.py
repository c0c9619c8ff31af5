"""Hyperparameters: a number, a scalar tensor, or a pytree like the parameters, checked."""

from collections.abc import Iterator
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.checks import check_number
from bilevel.errors import ConfigurationError

#: A number, a tensor, or a pytree of these: like the parameters, or a prefix of them.
Hyperparameter = Any


def at_least_zero(name: str, value: Hyperparameter) -> Hyperparameter:
    """`value` with its numbers as floats, or `ConfigurationError` unless each is at least 0."""
    return _checked(name, value, minimum=0)


def above_zero(name: str, value: Hyperparameter) -> Hyperparameter:
    """`value` with its numbers as floats, or `ConfigurationError` unless each is above 0."""
    return _checked(name, value, above=0)


def decay_rate(name: str, value: Hyperparameter) -> Hyperparameter:
    """`value` with its numbers as floats, or `ConfigurationError` unless each is in [0, 1)."""
    return _checked(name, value, minimum=0, below=1)


def per_leaf(name: str, value: Hyperparameter, like: Any) -> list[float | Tensor]:
    """The value of a hyperparameter for each leaf of `like`, in the order of its leaves.

    Args:
        name: What errors call it.
        value: A number or a tensor for all leaves, or a pytree of these that is a prefix of
            `like`: containers are matched by their keys or positions, whatever their order. Each
            tensor must broadcast against every leaf that it is for. A tensor of shape [p], where
            `like` has several leaves and p entries in all, is one value an entry.
        like: A pytree of tensors.

    Raises:
        ConfigurationError: The structure or a shape does not fit, or the order of the p entries is
            not the same for everybody.
    """
    leaves = named(like)
    size = sum(leaf.numel() for _, leaf in leaves)
    if isinstance(value, Tensor) and value.shape == (size,) and len(leaves) > 1:
        _check_order(name, like, size)
        pieces = value.split([leaf.numel() for _, leaf in leaves])
        return [piece.view(leaf.shape) for piece, (_, leaf) in zip(pieces, leaves, strict=True)]
    values = list(_spread(name, value, like, ""))
    for each, (path, leaf) in zip(values, leaves, strict=True):
        if isinstance(each, Tensor) and each.dim() and not _broadcasts(each, leaf):
            raise ConfigurationError(
                f"{name} has shape {tuple(each.shape)} for the parameters at {path!r}, of shape "
                f"{tuple(leaf.shape)}: it must be a number, or broadcast against them"
                + (f", or be one vector of all {size} entries" if len(leaves) > 1 else "")
            )
    return values


def raveled(name: str, value: Hyperparameter, like: Any) -> float | Tensor:
    """A scalar as it is; anything else as one vector, an entry for each of `like`, differentiably.

    Its entries are in the order of `optree.tree_leaves(like)`, each leaf raveled. Of numbers it is
    float64, whatever the dtype of the parameters.

    Raises:
        ConfigurationError: As for `per_leaf`.
    """
    if is_scalar(value):
        return value
    leaves = optree.tree_leaves(like)
    values = [
        torch.as_tensor(each, dtype=torch.float64, device=leaf.device)
        if isinstance(each, (int, float))
        else each
        for each, leaf in zip(per_leaf(name, value, like), leaves, strict=True)
    ]
    dtype = max((each.dtype for each in values), key=lambda dtype: torch.finfo(dtype).bits)
    return torch.cat(
        [
            each.to(leaf.device, dtype).expand(leaf.shape).reshape(-1)
            for each, leaf in zip(values, leaves, strict=True)
        ]
    )


def named(like: Any) -> list[tuple[str, Tensor]]:
    """Every leaf of the parameters with its name: `layers/0/weight`; a lone tensor is `params`."""
    paths, leaves, _ = optree.tree_flatten_with_path(like)
    names = ["/".join(str(part) for part in path) or "params" for path in paths]
    return list(zip(names, leaves, strict=True))


def is_scalar(value: Hyperparameter) -> bool:
    """Whether a hyperparameter is one number for all parameters."""
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0)


def _checked(name: str, value: Hyperparameter, **bounds: float) -> Hyperparameter:
    """Tensors are not looked into: they may be differentiated, and on an accelerator."""

    def check(leaf: Any) -> float | Tensor:
        if not isinstance(leaf, Tensor):
            return check_number(name, leaf, **bounds)
        if not leaf.is_floating_point():
            raise ConfigurationError(f"{name} is a {leaf.dtype} tensor: it must be floating-point")
        return leaf

    if not optree.tree_leaves(value, none_is_leaf=True):
        return check_number(name, value, **bounds)
    return optree.tree_map(check, value, none_is_leaf=True)


def _spread(name: str, value: Hyperparameter, like: Any, path: str) -> Iterator[float | Tensor]:
    """`value` for every leaf of `like`, which sits at `path` of the parameters."""
    if like is None:
        return
    if isinstance(value, (int, float, Tensor)):
        for _ in optree.tree_leaves(like):
            yield value
        return
    where = f" at {path!r}" if path else ""
    if isinstance(like, Tensor):
        raise ConfigurationError(
            f"{name} is a {type(value).__name__}{where}, where the parameters are a tensor of "
            f"shape {tuple(like.shape)}: it must be a number, a tensor, or a pytree like the "
            "parameters"
        )
    found, ours = optree.tree_flatten_one_level(value), optree.tree_flatten_one_level(like)
    given = dict(zip(found.entries, found.children, strict=True))
    if set(given) != set(ours.entries):
        raise ConfigurationError(
            f"{name} has {_listed(given)}{where}, where the parameters have "
            f"{_listed(ours.entries)}: it must be a number, a tensor, or a pytree like the "
            "parameters"
        )
    for entry, child in zip(ours.entries, ours.children, strict=True):
        yield from _spread(name, given[entry], child, f"{path}/{entry}" if path else str(entry))


def _listed(entries: Any) -> str:
    names = [repr(entry) for entry in entries]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") or "nothing"


def _broadcasts(value: Tensor, leaf: Tensor) -> bool:
    """Whether `value` takes the shape of `leaf`, which stays as it is."""
    padded = (1,) * (leaf.dim() - value.dim()) + tuple(value.shape)
    return len(padded) == leaf.dim() and all(
        given in (1, wanted) for given, wanted in zip(padded, leaf.shape, strict=True)
    )


def _check_order(name: str, like: Any, size: int) -> None:
    """Raise where a dict of the parameters is not sorted: its order would be anyone's guess."""
    if isinstance(like, Tensor) or like is None:
        return
    level = optree.tree_flatten_one_level(like)
    if isinstance(like, dict) and list(like) != list(level.entries):
        raise ConfigurationError(
            f"{name} is one vector of {size} entries, and the parameters are a dict with the keys "
            f"{_listed(like)}, which has two orders, that one and the sorted one: give a pytree "
            "like the parameters"
        )
    for child in level.children:
        _check_order(name, child, size)
