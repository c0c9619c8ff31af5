"""Calls of functions, and loops over a step, on lists of tensors: what a compiler is given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import Any, final

import optree
import torch
from torch import Tensor

#: Why steps cannot be a loop.
CHANGES = "a step changes the structure, the shapes or dtypes of what it carries"


class NotAlikeError(Exception):
    """Why steps cannot be made as one loop: a sentence."""


@final
class Call:
    """`function(*args)` of lists of tensors.

    Args:
        function: Of pytrees, to a pytree of tensors.
        leaves: Those of its arguments. What is no tensor is a constant, and a tensor that requires
            a gradient is a leaf that does.
        spec: Their structure.
    """

    def __init__(self, function: Callable[..., Any], leaves: Sequence[Any], spec: Any) -> None:
        self._function, self._spec = function, spec
        self._output_spec: Any = None
        # Not the tensors: a call outlives its arguments, and they may be on a graph.
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self._known = [leaf.requires_grad if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def tensors(self, leaves: Sequence[Any]) -> list[Tensor]:
        """What `run` takes of such leaves."""
        pairs = zip(leaves, self._is_tensor, strict=True)
        return [leaf.detach() for leaf, is_tensor in pairs if is_tensor]

    def run(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors of the result, off any graph."""
        remaining = iter(tensors)
        leaves = [
            next(remaining).detach().requires_grad_(known) if is_tensor else known
            for known, is_tensor in zip(self._known, self._is_tensor, strict=True)
        ]
        outputs, self._output_spec = optree.tree_flatten(
            self._function(*optree.tree_unflatten(self._spec, leaves))
        )
        return [output.detach() for output in outputs]

    def arranged(self, outputs: Sequence[Tensor]) -> Any:
        """The pytree of what `run` returns, once it was made."""
        return optree.tree_unflatten(self._output_spec, list(outputs))


@final
class Loop:
    """`carry, y = function(*fixed, carry, x)`, step after step.

    Args:
        function: One step.
        fixed: What all steps share. What is no tensor in it is a constant.
        carry: A pytree of tensors, of the same structure, shapes and dtypes after every step.
        xs: A pytree of tensors of shape [length, …], of which a step gets one entry each.
        length: How many steps, at least one.

    Attributes:
        length: That number.
        carry: The tensors of the carry, contiguous, each of its own memory.
        xs: Those of xs; a counter where there are none.
        more: Those of `fixed`.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Any, Any]],
        fixed: tuple[Any, ...],
        carry: Any,
        xs: Any,
        length: int,
    ) -> None:
        self.length = length
        self._function, self._given = function, (fixed, carry, xs)
        shared: Any = fixed
        leaves, self._fixed_spec = optree.tree_flatten(shared)
        self._fixed = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        start, self._carry_spec = optree.tree_flatten(carry)
        along, self._xs_spec = optree.tree_flatten(xs)
        self.carry = _of_their_own(start)
        self.xs = [x.detach() for x in along] or [torch.zeros(length)]
        self._has_xs = bool(along)
        self.more = [leaf for leaf in self._fixed if isinstance(leaf, Tensor)]
        self._output_spec: Any = None

    @property
    def tensors(self) -> list[Tensor]:
        """[*carry, *xs, *more]."""
        return [*self.carry, *self.xs, *self.more]

    def without_values(self) -> Loop:
        """This loop of tensors that hold nothing: what a graph of it may keep."""
        bare = copy.copy(self)
        bare._given = ((), (), ())
        bare._fixed = [_without_values(leaf) for leaf in self._fixed]
        bare.carry, bare.xs, bare.more = (
            [_without_values(leaf) for leaf in leaves]
            for leaves in (self.carry, self.xs, self.more)
        )
        return bare

    def description(self) -> tuple[Hashable, ...]:
        """What decides which graph fits this loop: everything but values, and the length."""
        return (
            self._fixed_spec,
            self._carry_spec,
            self._xs_spec,
            tuple(map(describe, self._fixed)),
            tuple(map(describe, self.carry)),
            tuple((x.shape[1:], x.dtype, x.device) for x in self.xs),
        )

    def step(self, *tensors: Tensor) -> list[Tensor]:
        """One step, from [*carry, *x, *more] to [*carry, *y]."""
        count, along = len(self.carry), len(self.carry) + len(self.xs)
        more = iter(tensors[along:])
        fixed = [next(more) if isinstance(leaf, Tensor) else leaf for leaf in self._fixed]
        x = list(tensors[count:along]) if self._has_xs else []
        carry, y = self._function(
            *optree.tree_unflatten(self._fixed_spec, fixed),
            optree.tree_unflatten(self._carry_spec, list(tensors[:count])),
            optree.tree_unflatten(self._xs_spec, x),
        )
        after, spec = optree.tree_flatten(carry)
        if spec != self._carry_spec or [(x.shape, x.dtype) for x in after] != [
            (x.shape, x.dtype) for x in self.carry
        ]:
            raise TypeError(CHANGES)
        outputs, self._output_spec = optree.tree_flatten(y)
        return [output.detach() for output in (*after, *outputs)]

    def run(
        self, step: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], length: int
    ) -> list[Tensor]:
        """Another loop like this one, from [*carry, *xs, *more] to [*carry, *stacked y]."""
        count, along = len(self.carry), len(self.carry) + len(self.xs)
        carry, xs, more = list(tensors[:count]), tensors[count:along], tensors[along:]
        outputs = []
        for index in range(length):
            after = step(*carry, *(x[index] for x in xs), *more)
            carry = list(after[:count])
            outputs.append(after[count:])
        return [*carry, *map(torch.stack, zip(*outputs, strict=True))]

    def arranged(self, outputs: Sequence[Tensor]) -> tuple[Any, Any]:
        """(the carry, the stacked y) of what `run` returns, once a step was made."""
        count = len(self.carry)
        return (
            optree.tree_unflatten(self._carry_spec, list(outputs[:count])),
            optree.tree_unflatten(self._output_spec, list(outputs[count:])),
        )

    def step_by_step(self, call: Callable[..., Any]) -> tuple[Any, Any]:
        """The loop with every step made by `call(function, *args)`.

        Raises:
            NotAlikeError: The carry does not keep its structure, shapes and dtypes.
        """
        fixed, carry, xs = self._given
        outputs = []
        before = _form(carry)
        for index in range(self.length):
            x = optree.tree_map(lambda x, index=index: x[index], xs)
            carry, y = call(self._function, *fixed, carry, x)
            if _form(carry) != before:
                raise NotAlikeError(CHANGES)
            outputs.append(y)
        return carry, optree.tree_map(lambda *each: torch.stack(each), *outputs)


def _without_values(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf


def _form(tree: Any) -> tuple[Any, ...]:
    leaves, spec = optree.tree_flatten(tree)
    return spec, *((x.shape, x.dtype) if isinstance(x, Tensor) else type(x) for x in leaves)


def describe(leaf: Any) -> Hashable:
    """What of an argument decides which graph fits it."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    return leaf


def _of_their_own(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, contiguous and no two of the same memory."""
    seen: set[int] = set()
    found = []
    for tensor in tensors:
        own = tensor.detach().contiguous()
        if own.data_ptr() in seen:
            own = own.clone()
        seen.add(own.data_ptr())
        found.append(own)
    return found
