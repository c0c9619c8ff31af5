"""Whether the parameters that a module holds are what its layers draw for themselves."""

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.errors import ProblemError

#: Draws that parameters are compared with: so many of the whole module, at least 2, of so many
#: numbers in all; and of one parameter so many entries.
DRAWS = 8
NUMBERS = 2**17
ENTRIES = 2**14

#: Parameters that a layer would draw less often than this are not its own.
CHANCE = 1e-9

_Signature = tuple[tuple[int, int], ...]
_found_right: weakref.WeakKeyDictionary[nn.Module, _Signature] = weakref.WeakKeyDictionary()


def resets_of(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module, Any]]:
    """(name, layer, its own initialisation or None), children first, parts of frozen ones left out.

    A layer's own initialisation may overwrite that of its parts, so it comes after theirs.
    """
    for part, child in module.named_children():
        yield from resets_of(child, f"{name}.{part}" if name else part)
    if any(parameter.requires_grad for parameter in module.parameters()):
        reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        yield name, module, reset if callable(reset) else None


def check_own_initialisation(module: nn.Module, draw: Callable[[int], nn.Module]) -> None:
    """Raise unless the trained parameters of `module` look like what its layers draw.

    Constants are compared exactly, such as the ones of a norm. Of random ones, how their entries
    are distributed; a few entries tell little. Parameters that are not finite tell nothing.

    Args:
        module: The module as it is held.
        draw: Has every layer of a copy draw its own initialisation from a seed; gives the copy.

    Raises:
        ProblemError: One does not; the message names it and says what to do.
    """
    signature = tuple((id(p), p._version) for p in module.parameters())
    if _found_right.get(module) == signature:
        return
    held = {name: p for name, p in module.named_parameters() if p.requires_grad}
    count = sum(parameter.numel() for parameter in held.values())
    draws = [
        {name: p.detach().clone() for name, p in draw(seed).named_parameters()}
        for seed in range(max(2, min(DRAWS, NUMBERS // max(count, 1))))
    ]
    for name, parameter in held.items():
        value, *drawn = (
            each.detach().double().cpu().flatten()
            for each in (parameter, *(one[name] for one in draws))
        )
        if bool(torch.isfinite(value).all()) and not _is_likely(value, torch.stack(drawn)):
            raise ProblemError(
                f"the parameter {name!r} is not what its layer's reset_parameters() draws, so "
                "there is another initialisation, or it was trained or loaded, and a fresh draw "
                "would be a guess: give a function that builds the module, as in "
                "fresh_parameters(lambda: Net(), generator), and its own initialisation is used; "
                "a part that is to stay as it is, freeze with requires_grad_(False)"
            )
    _found_right[module] = signature


def _is_likely(value: Tensor, drawn: Tensor) -> bool:
    """Whether `value`, of n entries, may be one of the draws, one a row, that are given."""
    if bool((drawn == drawn[0]).all()):
        return torch.equal(value, drawn[0])
    stride = -(-len(value) // ENTRIES)
    value, pool = value[::stride], drawn[:, ::stride].flatten()
    if len(pool.unique()) > 0.9 * len(pool) and _repeats(value, pool):
        return False
    n, total = len(value), len(value) + len(pool)
    sizes, others = value.abs(), pool.abs()
    # The k largest of all n + N numbers are equally likely to be any k of them.
    larger, smaller = int((sizes > others.max()).sum()), int((others > sizes.max()).sum())
    distance = max(_distance(value, pool), _distance(sizes, others))
    chances = [
        (n / total) ** larger,
        (1 - n / total) ** smaller,
        2 * math.exp(-2 * distance**2 * n * (1 - n / total)),
    ]
    return min(chances) > CHANCE


def _repeats(value: Tensor, pool: Tensor) -> bool:
    """Whether numbers occur more than once, or 0 often, as they hardly ever do in draws."""
    often = len(value) > 1 and len(value.unique()) <= len(value) // 2
    return often or int((value == 0).sum()) > 0.1 * len(value) + int((pool == 0).sum())


def _distance(one: Tensor, other: Tensor) -> float:
    """Kolmogorov and Smirnov's: the largest difference of two distribution functions."""
    points = torch.cat([one, other])
    below = [
        torch.searchsorted(sample.sort().values, points, right=True).double() / len(sample)
        for sample in (one, other)
    ]
    return float((below[0] - below[1]).abs().max())
