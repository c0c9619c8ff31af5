"""PyTorch's compiler without Dynamo, and its `scan`.

They are private, as are the decompositions and the merging of equal operations that the modules
beside this one use; the rest of the package has nothing that is.
Written for torch 2.11 to 2.14. Whatever is missing in another version raises, and `Compiler` then
does without, with a warning.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from bilevel.compiler.decompositions import DECOMPOSITIONS
from bilevel.compiler.refusals import ValuesUnread, no_forward_mode_of_users
from bilevel.compiler.rewriting import simplify

#: A compiled function of tensors.
Compiled = Callable[[Sequence[Tensor]], list[Tensor]]

#: Steps in the example that a scan is compiled for. Of any other number it is the same graph; 0 and
#: 1 would be taken for constants.
EXAMPLE_LENGTH = 7

_has_cpp_scan = True

#: Tracing changes PyTorch's own functions meanwhile, so one thread does it at a time.
_TRACING = threading.RLock()


def surroundings() -> Hashable:
    """What of PyTorch's own state goes into a graph: default dtype and autocast."""
    autocast = tuple(
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        for kind in ("cpu", "cuda")
    )
    return torch.get_default_dtype(), autocast


def trace(
    function: Callable[..., list[Tensor]], args: Sequence[Tensor]
) -> tuple[fx.GraphModule, list[Tensor]]:
    """(a graph of ATen operations, the constants that it takes after its arguments).

    Derivatives that the function takes are in the graph. Tensors that it reaches otherwise than
    by its arguments become arguments.
    """
    with torch.no_grad(), _TRACING, no_forward_mode_of_users(), ValuesUnread():
        graph = make_fx(function, decomposition_table=DECOMPOSITIONS)(*args)
    constants: dict[str, fx.Node] = {}
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1:]
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and isinstance(getattr(graph, node.target), Tensor):
            if node.target not in constants:
                with graph.graph.inserting_after(*last):
                    placeholder = graph.graph.placeholder(f"constant{len(constants)}")
                constants[node.target], last = placeholder, [placeholder]
            node.replace_all_uses_with(constants[node.target])
            graph.graph.erase_node(node)
    graph.graph = simplify(graph.graph)
    return graph, [getattr(graph, name) for name in constants]


def compile_graph(graph: fx.GraphModule, args: Sequence[Tensor]) -> Compiled:
    """The graph as machine code for arguments of these shapes."""
    return _compile(graph, _fake_mode(), list(args), [])


def compile_scan(
    step: Callable[..., list[Tensor]],
    carry: Sequence[Tensor],
    xs: Sequence[Tensor],
    more: Sequence[Tensor],
) -> Compiled:
    """A loop over `step` as one graph, for any number of steps.

    Args:
        step: (*carry, *x, *more) to [*carry, *y]; it is traced.
        carry: What goes from step to step, contiguous, no two of the same memory.
        xs: What steps take one by one, stacked in their first dimension; at least one.
        more: What all steps share.

    Returns:
        A function of [*carry, *xs, *more] that returns [*last carry, *stacked ys].
    """
    from torch._higher_order_ops.scan import scan_op

    graph, constants = trace(step, [*carry, *(x[0] for x in xs), *more])
    counts = len(carry), len(xs)

    def body(*args: Tensor) -> list[Tensor]:
        # No output may be an input, nor another output.
        return [each.clone(memory_format=torch.contiguous_format) for each in graph(*args)]

    def loop(*args: Tensor) -> list[Tensor]:
        start, along = list(args[: counts[0]]), list(args[counts[0] : sum(counts)])
        return list(scan_op(body, start, along, tuple(args[sum(counts) :])))

    example = [x.new_empty((EXAMPLE_LENGTH, *x.shape[1:])) for x in xs]
    compiled = _compile(loop, _fake_mode(), [*carry, *more, *constants], example, at=counts[0])
    return lambda tensors: compiled([*tensors, *constants])


def _fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def _compile(
    function: Callable[..., Any],
    mode: Any,
    fixed: list[Tensor],
    stacked: list[Tensor],
    at: int = 0,
) -> Compiled:
    """Machine code for a function of `fixed` with `stacked`, of any length, from position `at`."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    global _has_cpp_scan

    def any_length(x: Tensor) -> Tensor:
        sizes = [DimDynamic.DUCK] + [DimDynamic.STATIC] * (x.dim() - 1)
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        fake: Tensor = mode.from_tensor(x.detach(), symbolic_context=context)
        return fake

    fakes = [mode.from_tensor(x.detach(), static_shapes=True) for x in fixed]
    fakes[at:at] = map(any_length, stacked)
    with torch.no_grad():
        graph = make_fx(function, tracing_mode="real")(*fakes)
    options: dict[str, Any] = {
        # Without this the cache on disk leaves out every graph with a scan.
        "unsafe_marked_cacheable_functions": {
            f"torch.ops.higher_order.{name}": torch.__version__ for name in ("scan", "while_loop")
        },
        "cpp_wrapper": fixed[0].device.type == "cpu" and (not stacked or _has_cpp_scan),
    }
    compiled: Any = None
    if options["cpp_wrapper"]:
        try:
            with config.patch(options):
                compiled = compile_fx(graph, fakes)
        except Exception:  # Before torch 2.14 it cannot have a scan.
            _has_cpp_scan, options["cpp_wrapper"] = not stacked, False
            return _compile(function, _fake_mode(), fixed, stacked, at)
    else:
        with config.patch(options):
            compiled = compile_fx(graph, fakes)

    def run(args: Sequence[Tensor]) -> list[Tensor]:
        return list(compiled(*args))

    return run
