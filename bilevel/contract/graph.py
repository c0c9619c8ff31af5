"""Looking at an autograd graph: where it ends, and what it keeps in memory."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.autograd.graph import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode

#: The code that `once_differentiable` puts around every backward it marks.
_ONCE = once_differentiable(lambda *args: None).__code__


def nodes_of(outputs: Iterable[Tensor], beyond: Iterable[Tensor] = ()) -> Iterator[Any]:
    """Every node of the graph that `outputs` are on, each once, up to those of `beyond`."""
    return _nodes_from(
        (output.grad_fn for output in outputs), {tensor.grad_fn for tensor in beyond}
    )


def leaves_of(outputs: Iterable[Tensor], beyond: Iterable[Tensor] = ()) -> list[Tensor]:
    """The leaf tensors that require a gradient and that `outputs` depend on, each once.

    What they depend on through tensors of `beyond` alone, which are no leaves, is left out.
    """
    outputs = list(outputs)
    leaves = [output for output in outputs if output.requires_grad and output.grad_fn is None]
    leaves += [node.variable for node in nodes_of(outputs, beyond) if hasattr(node, "variable")]
    return list({id(leaf): leaf for leaf in leaves}.values())


def nodes_so_far() -> int:
    """How many nodes this thread has made: the `_sequence_nr` of the next one.

    A leaf's own node counts as the last of all.
    """
    node = (torch.ones((), requires_grad=True) * 1).grad_fn
    assert node is not None
    return node._sequence_nr() + 1


def leaves_behind(nodes: Iterable[Node]) -> Iterator[Tensor]:
    """The leaf tensors at the ends of the graph behind some of its nodes."""
    return (node.variable for node in _nodes_from(nodes, set()) if hasattr(node, "variable"))


def _nodes_from(nodes: Iterable[Node | None], seen: set[Node | None]) -> Iterator[Any]:
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [parent for parent, _ in node.next_functions]


def functions_of(output: Tensor) -> list[type[Function]]:
    """The classes of `torch.autograd.Function` in the graph of `output`, each once."""
    found = (getattr(node, "_forward_cls", None) for node in nodes_of([output]))
    return [function for function in dict.fromkeys(found) if function is not None]


def is_differentiable_once(function: type[Function]) -> bool:
    """Whether a Function refuses a second derivative.

    PyTorch itself raises only where the incoming gradient requires one, not where saved tensors do.
    """
    return getattr(function.backward, "__code__", None) is _ONCE


def inside_transform() -> bool:
    """Whether this is called inside a transform of `torch.func`, such as grad or vmap."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_tracing() -> bool:
    """Whether this is called by a function that is being made a graph."""
    return get_proxy_mode() is not None


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
    return (
        tensor.layout is torch.strided
        and type(tensor) in (Tensor, torch.nn.Parameter)
        # A tangent of zeros has no memory.
        and not tensor._is_zerotensor()
    )
