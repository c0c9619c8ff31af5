"""A problem and its optimizer in float64, for as long as a check takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optree
import torch
from torch import Tensor, nn

from bilevel.contract.held import reachable
from bilevel.recording.outer_gradient import MicroBatches
from bilevel.tree import in_double, is_differentiable


@contextmanager
def in_float64(*owners: object) -> Iterator[None]:
    """Inside, the floating-point tensors that objects can reach hold float64 copies.

    Attributes, closures, defaults, globals and modules with their parameters and buffers; and
    tensors that are made without a dtype are float64. Afterwards all hold what they held before.
    """
    held: dict[int, Tensor] = {}
    for _, value, _ in reachable(*owners):
        found = [*value.parameters(), *value.buffers()] if isinstance(value, nn.Module) else [value]
        held.update({id(x): x for x in found if _is_converted(x)})
    before = [(tensor, tensor.data) for tensor in held.values()]
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        for tensor, data in before:
            tensor.data = data.double()
        yield
    finally:
        torch.set_default_dtype(default)
        for tensor, data in before:
            tensor.data = data


def to_float64(tree: Any) -> Any:
    """The pytree, or `MicroBatches` of pytrees, with its floating-point tensors in float64."""
    if isinstance(tree, MicroBatches):
        return MicroBatches([to_float64(batch) for batch in tree.batches], tree.weights)
    return optree.tree_map(
        lambda leaf: in_double(leaf.detach()) if is_differentiable(leaf) else leaf, tree
    )


def _is_converted(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dtype != torch.float64
        and value.layout is torch.strided
    )
