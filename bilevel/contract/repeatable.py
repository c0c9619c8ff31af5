"""Whether something is the same when it is made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import optree
import torch
from torch import Tensor

from bilevel.errors import ProblemError
from bilevel.tree import detach, is_differentiable, tensors_in
from bilevel.variables import OuterVariables

#: Two results of the same computation may differ by so many rounding units, where sums are split
#: over threads or a device decides their order.
ROUNDING_UNITS = 64


def is_same(one: Any, other: Any) -> bool:
    """Whether two pytrees are equal up to rounding. What cannot be compared counts as equal."""
    leaves, spec = optree.tree_flatten(one)
    others, other_spec = optree.tree_flatten(other)
    return spec == other_spec and all(map(_is_same_leaf, leaves, others))


def _is_same_leaf(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
            return False
        if one.layout is not torch.strided:
            one, other = one.to_dense(), other.to_dense()
        if not is_differentiable(one) or not one.numel():
            return torch.equal(one, other)
        # Of the largest entry: in sums that cancel, rounding is as large as what they are made of.
        tolerance = ROUNDING_UNITS * torch.finfo(one.dtype).eps
        size = float(one.detach().nan_to_num().abs().max())
        return torch.allclose(one, other, rtol=tolerance, atol=tolerance * size, equal_nan=True)
    if type(one) is type(other) and type(one).__eq__ is object.__eq__:
        return True  # Objects that are equal to nothing but themselves, such as modules.
    try:
        return bool((one == other).all()) if hasattr(one, "all") else bool(one == other)
    except (TypeError, ValueError, RuntimeError):
        return True


@torch.no_grad()
def check_made_again(method: str, made: Any, make: Callable[[], Any]) -> None:
    """Raise `ProblemError` unless a method makes the same again."""
    try:
        what = "" if is_same(detach(made), detach(make())) else "returned something else"
    except Exception as error:
        what = f"raised {type(error).__name__} ({error})"
    if what:
        raise ProblemError(
            f"{method}, called again with the same arguments, {what}. This estimator runs steps "
            "again for other outer variables: draw from the generator that the method is given, "
            "and choose examples by `step` (docs/contract.md)"
        )


@final
class Kept:
    """What a step takes of φ, as it is now, to see later whether that was written over.

    Of tensors PyTorch itself would notice; of arrays that share their memory with them it cannot.

    Args:
        variables: φ.
        inputs: The pytree, on the graph of φ.
    """

    def __init__(self, variables: OuterVariables, inputs: Any) -> None:
        self._variables, self._inputs = variables, inputs
        self._copies = [leaf.detach().clone() for leaf in tensors_in(inputs)]
        self._slopes = variables.slopes(inputs)

    def check(self, step: int) -> None:
        """Raise `ProblemError` if it, or its derivative, has changed."""
        if not (
            is_same(self._copies, detach(tensors_in(self._inputs)))
            and is_same(self._slopes, self._variables.slopes(self._inputs))
        ):
            raise ProblemError(
                f"inner_batch writes over memory that step {step} and its derivative still need, "
                "as an array does that is filled anew for every step: make a new tensor in every "
                "call"
            )


def impure(method: str, one: Any, other: Any) -> ProblemError:
    """The error that says that a method returned two things for the same arguments."""
    return ProblemError(
        f"{method} is no pure function: called twice with the same arguments it gave {one} and "
        f"then {other}. Look for a counter, a generator or a buffer that it changes; random draws "
        "come from the generator of inner_batch (docs/contract.md; bilevel.gradcheck looks at "
        "every method)"
    )


@contextmanager
def global_generators_left_alone(method: str, device: torch.device) -> Iterator[None]:
    """Raise `ProblemError` if one of PyTorch's global generators is drawn from inside."""

    def states() -> list[Tensor]:
        found = [torch.get_rng_state()]
        return [*found, torch.cuda.get_rng_state(device)] if device.type == "cuda" else found

    before = states()
    yield
    if not all(map(torch.equal, before, states())):
        raise ProblemError(
            f"{method} draws from PyTorch's global generator, as dropout does, so a step that is "
            "run again would differ: draw in inner_batch, from the generator that it is given, and "
            "put the module in eval mode"
        )
