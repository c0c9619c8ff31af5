"""Pure functions of tensors, and loops over them, each run as one compiled graph."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, final

import optree
import torch
from torch import Tensor

from bilevel.compiler import inductor
from bilevel.compiler.loop import Loop, describe
from bilevel.contract.held import Snapshot
from bilevel.errors import CompileWarning
from bilevel.tree import is_differentiable

#: Largest relative error of a compiled result against eager mode, by the result's dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

#: Compiled graphs of one function after which new argument shapes are run in eager mode.
GRAPHS_PER_FUNCTION = 8

#: Steps of a loop that are compared with eager mode: after many, a chaotic run has parted from it.
STEPS_COMPARED = 2


@final
class Compiler:
    """Runs functions of pytrees of tensors as graphs, each compiled once and then reused.

    A function is traced to ATen operations, with the derivatives it takes inside, and the graph is
    handed to PyTorch's compiler. There is one graph for every combination of tree structure,
    shapes, dtypes, devices, and values of arguments that are no tensors; a loop over a step
    (`scan`) is one graph for any number of steps. Tensors that a function reaches other than
    through its arguments are constants of the graph; `depends_on` says when they change.

    The first call of every graph is checked against eager mode; of a loop, its first steps, and if
    these differ its last ones, before it is refused. An output may be off by

        TOLERANCE · ‖eager‖ + 10 · ‖eager at arguments off by one unit in the last place − eager‖

    where the second term allows for what rounding does to an ill-conditioned output. If one is off
    by more than that, and more than twice as far as eager mode's from the same function of float64
    arguments, or if the graph cannot be traced or compiled, a `CompileWarning` says so, and from
    then on this function is run in eager mode, or the loop step by step.

    Functions must be pure: no random draws, no branches on the values of tensors, no writing in
    place to their arguments.

    Args:
        backend: "inductor"; "eager", which only traces; or a function of a graph and example inputs
            that returns what to call. With these two, Python makes the loops.

    Attributes:
        seconds: Wall clock spent on tracing, compiling and checking so far.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        self.backend = backend
        self.seconds = 0.0
        self._graphs: dict[tuple[Hashable, ...], Callable[[Any], Any]] = {}
        self._eager: set[Hashable] = set()
        self._context: Hashable = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy compiles its own graphs: those of this one belong to its functions."""
        return {**self.__dict__, "_graphs": {}, "_eager": set(), "_context": None}

    @property
    def refused(self) -> int:
        """How many functions and loops could not be trusted, or not be compiled."""
        return len(self._eager)

    def depends_on(self, context: Hashable) -> None:
        """Say what else the functions depend on: another value than before means new graphs."""
        self._context = context

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, whose result is cut off any autograd graph."""
        arguments: Any = args
        leaves, spec = optree.tree_flatten(arguments)
        graph = self._graph(
            (function, "is run in eager mode"),
            (spec, *map(describe, leaves)),
            lambda: self._compile(function, leaves, spec),
        )
        if graph is None:
            return function(*args)
        with torch.no_grad():
            return graph(leaves)

    @torch.no_grad()
    def scan(self, function: Callable[..., tuple[Any, Any]], *args: Any) -> tuple[Any, Any]:
        """(the last carry, all y, stacked) of the `Loop` of these arguments."""
        loop = Loop(function, *args)
        graph = self._graph(
            (function, "is run step by step"),
            loop.description(),
            lambda: self._compile_loop(loop),
        )
        return loop.step_by_step(self) if graph is None else graph(loop)

    def _graph(
        self,
        kind: tuple[Callable[..., Any], str],
        described: Sequence[Hashable],
        make: Callable[[], Callable[[Any], Any]],
    ) -> Callable[[Any], Any] | None:
        """The graph for such arguments, made if need be; None where there shall be none."""
        if kind in self._eager:
            return None
        key = (kind, self._context, *described)
        try:
            known = key in self._graphs
        except TypeError as error:
            return self._refused(
                kind,
                f"it is given a constant that cannot be told from others ({error}); make it a "
                "tensor, or an attribute of the problem",
            )
        if not known:
            if sum(other[0] == kind for other in self._graphs) >= GRAPHS_PER_FUNCTION:
                return self._refused(
                    kind,
                    f"it was called with more than {GRAPHS_PER_FUNCTION} combinations of shapes "
                    "and constants; compile=False avoids compiling at all",
                )
            started = time.perf_counter()
            try:
                self._graphs[key] = make()
            except _RefusalError as refusal:
                return self._refused(kind, str(refusal))
            finally:
                self.seconds += time.perf_counter() - started
        return self._graphs[key]

    def _refused(self, kind: tuple[Callable[..., Any], str], reason: str) -> Any:
        function, what_is_done = kind
        name = getattr(function, "__qualname__", str(function))
        warnings.warn(f"{name} {what_is_done}: {reason}", CompileWarning, stacklevel=5)
        self._eager.add(kind)
        return None

    @torch.no_grad()
    def _compile(
        self, function: Callable[..., Any], leaves: list[Any], spec: Any
    ) -> Callable[[Sequence[Any]], Any]:
        is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        needs_gradient = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves]
        structure: Any = None

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
            outputs, structure = optree.tree_flatten(
                function(*optree.tree_unflatten(spec, arguments))
            )
            return [output.detach() for output in outputs]

        def tensors_of(arguments: Sequence[Any]) -> list[Tensor]:
            return [x.detach() for x, chosen in zip(arguments, is_tensor, strict=True) if chosen]

        tensors = tensors_of(leaves)
        compiled = self._traced(flat, tensors)
        _check(compiled(tensors), flat, tensors)
        return lambda arguments: optree.tree_unflatten(
            structure, list(compiled(tensors_of(arguments)))
        )

    def _compile_loop(self, loop: Loop) -> Callable[[Loop], tuple[Any, Any]]:
        first = [*loop.carry, *(x[0] for x in loop.xs), *loop.more]
        if self.backend != "inductor":
            step = self._traced(loop.step, first)

            def compiled(tensors: Sequence[Tensor], length: int) -> list[Tensor]:
                return loop.run(lambda *args: step(args), tensors, length)

        else:
            whole = _or_refuse(lambda: _compiled_scan(loop, first))

            def compiled(tensors: Sequence[Tensor], length: int) -> list[Tensor]:
                return whole(tensors)

        count = min(loop.length, STEPS_COMPARED)

        def check(few: Sequence[Tensor]) -> None:
            _check(compiled(few, count), lambda *args: loop.run(loop.step, args, count), few)

        try:
            check([*loop.carry, *(x[:count] for x in loop.xs), *loop.more])
        except _RefusalError:
            # The first steps may be singular, as Adam's is; the last ones are then the judge.
            before = loop.length - count
            if not before:
                raise
            until = [*loop.carry, *(x[:before] for x in loop.xs), *loop.more]
            carry = loop.run(loop.step, until, before)[: len(loop.carry)]
            check([*carry, *(x[before:] for x in loop.xs), *loop.more])
        return lambda other: loop.arranged(compiled(other.tensors, other.length))

    def _traced(
        self, function: Callable[..., list[Tensor]], tensors: Sequence[Tensor]
    ) -> inductor.Compiled:
        def make() -> inductor.Compiled:
            graph, constants = inductor.trace(function, tensors)
            if self.backend == "inductor":
                compiled = inductor.compile_graph(graph, [*tensors, *constants])
                return lambda args: compiled([*args, *constants])
            called = graph if self.backend == "eager" else self.backend(graph, tensors)  # type: ignore[operator]
            return lambda args: list(called(*args, *constants))

        return _or_refuse(make)


@final
class _RefusalError(Exception):
    """Why something cannot be run as a graph."""


def _compiled_scan(loop: Loop, first: Sequence[Tensor]) -> inductor.Compiled:
    step, constants = inductor.trace(loop.step, first)
    compiled = inductor.compile_scan(step, loop.carry, loop.xs, [*loop.more, *constants])
    return lambda tensors: compiled([*tensors, *constants])


def _or_refuse(make: Callable[[], inductor.Compiled]) -> inductor.Compiled:
    try:
        return make()
    except Exception as error:  # whatever a tracer or a compiler raises
        raise _RefusalError(
            f"it could not be compiled ({type(error).__name__}: {_first_line(error)})"
        ) from error


def constants_of(*holders: Any) -> Snapshot:
    """What functions that are traced for these objects take from them as constants: all of it."""
    return Snapshot(*holders)


def _perturbed(tensor: Tensor) -> Tensor:
    """The tensor with every entry off by one unit in the last place, up and down in turn."""
    if not is_differentiable(tensor):
        return tensor
    signs = torch.ones(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    signs[::2] = -1
    return tensor * (1 + signs.view(tensor.shape) * torch.finfo(tensor.dtype).eps)


def _check(
    found: Sequence[Tensor],
    function: Callable[..., list[Tensor]],
    tensors: Sequence[Tensor],
) -> None:
    """Raise unless the compiled outputs are those of the function."""
    expected, perturbed = function(*tensors), function(*map(_perturbed, tensors))

    @functools.cache
    def in_double() -> list[Tensor] | None:
        try:
            return function(*map(_in_float64, tensors))
        except (RuntimeError, TypeError):  # It has constants of another dtype.
            return None

    def distance(value: Tensor, other: Tensor) -> Tensor:
        return torch.linalg.vector_norm(value.double() - other.double())

    for index, (got, wanted, moved) in enumerate(zip(found, expected, perturbed, strict=True)):
        if not is_differentiable(wanted):
            if not torch.equal(got, wanted):
                raise _RefusalError(f"output {index} of its graph differs from eager mode")
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
            raise _RefusalError(
                f"output {index} of the compiled graph differs from eager mode by a relative "
                f"{float(error / size):.1e} where at most {tolerance:.0e} is allowed (rounding of "
                f"the arguments alone changes it by {float(rounding / size):.1e})"
            )


def _in_float64(tensor: Tensor) -> Tensor:
    return tensor.double() if is_differentiable(tensor) else tensor


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"
