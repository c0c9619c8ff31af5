"""A compiled graph against the same function in eager mode."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from bilevel.tree import in_double, is_differentiable

#: Largest relative error of a compiled result against eager mode, by the result's dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@final
class DifferenceError(Exception):
    """How a graph differs from eager mode."""


def compare(
    found: Sequence[Tensor],
    function: Callable[..., list[Tensor]],
    tensors: Sequence[Tensor],
) -> None:
    """Raise `DifferenceError` unless what a graph `found` is what the function gives in eager mode.

    An output may be off by

        TOLERANCE · ‖eager‖ + 10 · ‖eager at arguments off by one unit in the last place − eager‖

    where the second term allows for what rounding does to an ill-conditioned output, and in any
    case by twice as much as eager mode is from the same function of float64 arguments.
    """
    expected, perturbed = function(*tensors), function(*map(_perturbed, tensors))

    @functools.cache
    def exactly() -> list[Tensor] | None:
        try:
            return function(*map(in_double, tensors))
        except (RuntimeError, TypeError):  # It has constants of another dtype.
            return None

    def distance(value: Tensor, other: Tensor) -> Tensor:
        return torch.linalg.vector_norm(in_double(value) - in_double(other))

    for index, (got, wanted, moved) in enumerate(zip(found, expected, perturbed, strict=True)):
        if not is_differentiable(wanted):
            if not torch.equal(got, wanted):
                raise DifferenceError(f"output {index} of its graph differs from eager mode")
            continue
        error, rounding = distance(got, wanted), distance(moved, wanted)
        size = torch.linalg.vector_norm(in_double(wanted))
        tolerance = TOLERANCE.get(wanted.dtype, 1e-3)
        if bool(torch.isfinite(size)) and not bool(error <= tolerance * size + 10 * rounding):
            exact = exactly()
            if exact is not None and bool(
                distance(got, exact[index]) <= 2 * distance(wanted, exact[index])
            ):
                continue
            raise DifferenceError(
                f"output {index} of the compiled graph differs from eager mode by a relative "
                f"{float(error / size):.1e} where at most {tolerance:.0e} is allowed (rounding of "
                f"the arguments alone changes it by {float(rounding / size):.1e})"
            )


def _perturbed(tensor: Tensor) -> Tensor:
    """The tensor with every entry off by one unit in the last place, up and down in turn."""
    if not is_differentiable(tensor):
        return tensor
    signs = torch.ones(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    signs[::2] = -1
    return tensor * (1 + signs.view(tensor.shape) * torch.finfo(tensor.dtype).eps)
