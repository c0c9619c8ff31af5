"""Looking at an autograd graph: where it ends, and what it keeps in memory."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node

#: The code that `once_differentiable` puts around every backward it marks.
_ONCE = once_differentiable(lambda *args: None).__code__


def nodes_of(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the graph that `outputs` are on, each once."""
    waiting: list[Node | None] = [output.grad_fn for output in outputs]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [parent for parent, _ in node.next_functions]


def leaves_of(outputs: Iterable[Tensor]) -> list[Tensor]:
    """The leaf tensors that require a gradient and that `outputs` depend on, each once."""
    outputs = list(outputs)
    leaves = [output for output in outputs if output.requires_grad and output.grad_fn is None]
    leaves += [node.variable for node in nodes_of(outputs) if hasattr(node, "variable")]
    return list({id(leaf): leaf for leaf in leaves}.values())


def differentiable_once(output: Tensor) -> str:
    """The name of an `autograd.Function` in the graph of `output` that refuses a second derivative.

    PyTorch itself raises only where the incoming gradient requires one, not where saved tensors do.
    """
    for node in nodes_of([output]):
        function = getattr(node, "_forward_cls", None)
        if getattr(getattr(function, "backward", None), "__code__", None) is _ONCE:
            return str(function.__name__)  # type: ignore[union-attr]
    return ""


def saved_storages(outputs: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of every storage that the graph of `outputs` keeps, and of theirs, by address."""
    outputs = list(outputs)
    found = list(outputs)
    for node in nodes_of(outputs):
        for name in dir(node):
            if name.startswith("_saved_") or name == "saved_tensors":
                try:
                    value = getattr(node, name)
                except RuntimeError:  # It has been freed, or is no longer what was saved.
                    continue
                found += value if isinstance(value, (list, tuple)) else [value]
    storages = [x.untyped_storage() for x in found if isinstance(x, Tensor) and _is_dense(x)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and type(tensor) in (Tensor, torch.nn.Parameter)
