"""Pure functions of tensors, each run as one compiled graph."""

import functools
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, final

import optree
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from bilevel.decompositions import DECOMPOSITIONS
from bilevel.errors import CompileWarning
from bilevel.held import Snapshot
from bilevel.tree import is_differentiable

#: Largest relative error of a compiled result against eager mode, by the result's dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

#: Compiled graphs of one function after which new argument shapes are run in eager mode.
GRAPHS_PER_FUNCTION = 8


@final
class Compiler:
    """Runs functions of pytrees of tensors as graphs, each compiled once and then reused.

    A function is traced to ATen operations, with the derivatives it takes inside, and the graph is
    handed to `torch.compile`. There is one graph for every combination of tree structure, shapes,
    dtypes, devices, and values of arguments that are no tensors. Tensors that the function reaches
    other than through its arguments are constants of the graph; `depends_on` says when they change.

    The first call of every graph is checked against eager mode. An output may be off by

        TOLERANCE · ‖eager‖ + 10 · ‖eager at arguments off by one unit in the last place − eager‖

    where the second term allows for what rounding does to an ill-conditioned output. If one is off
    by more than that, and more than twice as far as eager mode's from the same function of float64
    arguments, or if the graph cannot be traced or compiled, a `CompileWarning` says so and this
    function is run in eager mode from then on.

    Functions must be pure: no random draws, no branches on the values of tensors, no writing in
    place to their arguments.

    Args:
        backend: That of `torch.compile`: a name, or a function of a graph and example inputs.

    Attributes:
        seconds: Wall clock spent on tracing, compiling and checking so far.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        self.backend = backend
        self.seconds = 0.0
        self._graphs: dict[tuple[Hashable, ...], Callable[[Sequence[Any]], Any]] = {}
        self._eager: set[Hashable] = set()
        self._context: Hashable = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy compiles its own graphs: those of this one belong to its functions."""
        return {**self.__dict__, "_graphs": {}, "_eager": set(), "_context": None}

    @property
    def refused(self) -> int:
        """How many functions are run in eager mode, because their graphs could not be trusted."""
        return len(self._eager)

    def depends_on(self, context: Hashable) -> None:
        """Say what else the functions depend on: another value than before means new graphs."""
        self._context = context

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, whose result is cut off any autograd graph."""
        if function in self._eager:
            return function(*args)
        arguments: Any = args
        leaves, spec = optree.tree_flatten(arguments)
        key = (function, self._context, spec, tuple(map(_describe, leaves)))
        try:
            graph = self._graphs.get(key)
        except TypeError as error:
            name = getattr(function, "__qualname__", str(function))
            warnings.warn(
                f"{name} is run in eager mode: it is given a constant that cannot be told from "
                f"others ({error}); make it a tensor, or an attribute of the problem",
                CompileWarning,
                stacklevel=4,
            )
            self._eager.add(function)
            return function(*args)
        if graph is None:
            started = time.perf_counter()
            graph = self._compile(function, leaves, spec)
            self._graphs[key] = graph
            self.seconds += time.perf_counter() - started
        with torch.no_grad():
            return graph(leaves)

    @torch.no_grad()
    def _compile(
        self, function: Callable[..., Any], leaves: list[Any], spec: Any
    ) -> Callable[[Sequence[Any]], Any]:
        name = getattr(function, "__qualname__", str(function))
        is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        needs_gradient = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves]
        structure: Any = None

        def eager(arguments: Sequence[Any]) -> Any:
            return function(*optree.tree_unflatten(spec, list(arguments)))

        def flat(*tensors: Tensor) -> list[Tensor]:
            nonlocal structure
            remaining = iter(tensors)
            arguments = [
                next(remaining) if chosen else x
                for x, chosen in zip(leaves, is_tensor, strict=True)
            ]
            arguments = [
                x.detach().requires_grad_() if wanted else x
                for x, wanted in zip(arguments, needs_gradient, strict=True)
            ]
            outputs, structure = optree.tree_flatten(eager(arguments))
            return [output.detach() for output in outputs]

        def tensors_of(arguments: Sequence[Any]) -> list[Tensor]:
            return [x.detach() for x, chosen in zip(arguments, is_tensor, strict=True) if chosen]

        def refuse(reason: str) -> Callable[[Sequence[Any]], Any]:
            warnings.warn(f"{name} is run in eager mode: {reason}", CompileWarning, stacklevel=6)
            self._eager.add(function)
            return eager

        if sum(key[0] == function for key in self._graphs) >= GRAPHS_PER_FUNCTION:
            return refuse(
                f"it was called with more than {GRAPHS_PER_FUNCTION} combinations of shapes and "
                "constants; compile=False avoids compiling at all"
            )
        tensors = tensors_of(leaves)
        try:
            graph = make_fx(flat, decomposition_table=DECOMPOSITIONS)(*tensors)
            graph.graph.eliminate_dead_code()
            graph.recompile()
            compiled = torch.compile(graph, fullgraph=True, dynamic=False, backend=self.backend)
            found = compiled(*tensors)
        except Exception as error:  # whatever a tracer or a compiler raises
            return refuse(
                f"it could not be compiled ({type(error).__name__}: {_first_line(error)})"
            )

        @functools.cache
        def in_double() -> list[Tensor] | None:
            try:
                return flat(*map(_in_float64, tensors))
            except RuntimeError:  # It has constants of another dtype.
                return None

        fault = _fault(found, flat(*tensors), flat(*map(_perturbed, tensors)), in_double)
        if fault:
            return refuse(fault)
        return lambda arguments: optree.tree_unflatten(
            structure, list(compiled(*tensors_of(arguments)))
        )


def constants_of(*holders: Any) -> Snapshot:
    """What functions that are traced for these objects take from them as constants: all of it."""
    return Snapshot(*holders)


def _describe(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    return leaf


def _perturbed(tensor: Tensor) -> Tensor:
    """The tensor with every entry off by one unit in the last place, up and down in turn."""
    if not is_differentiable(tensor):
        return tensor
    signs = torch.ones(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    signs[::2] = -1
    return tensor * (1 + signs.view(tensor.shape) * torch.finfo(tensor.dtype).eps)


def _fault(
    found: list[Tensor],
    expected: list[Tensor],
    perturbed: list[Tensor],
    in_double: Callable[[], list[Tensor] | None],
) -> str:
    """What is wrong with the compiled outputs, or nothing."""

    def distance(value: Tensor, other: Tensor) -> Tensor:
        return torch.linalg.vector_norm(value.double() - other.double())

    for index, (got, wanted, moved) in enumerate(zip(found, expected, perturbed, strict=True)):
        if not is_differentiable(wanted):
            if not torch.equal(got, wanted):
                return f"output {index} of the compiled graph differs from eager mode"
            continue
        error, rounding = distance(got, wanted), distance(moved, wanted)
        size = torch.linalg.vector_norm(wanted.double())
        tolerance = TOLERANCE.get(wanted.dtype, 1e-3)
        if bool(torch.isfinite(size)) and not bool(error <= tolerance * size + 10 * rounding):
            exact = in_double()
            if exact is not None and bool(
                distance(got, exact[index]) <= 2 * distance(wanted, exact[index])
            ):
                continue
            return (
                f"output {index} of the compiled graph differs from eager mode by a relative "
                f"{float(error / size):.1e} where at most {tolerance:.0e} is allowed (rounding of "
                f"the arguments alone changes it by {float(rounding / size):.1e})"
            )
    return ""


def _in_float64(tensor: Tensor) -> Tensor:
    return tensor.double() if is_differentiable(tensor) else tensor


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"
