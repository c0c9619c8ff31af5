"""Pure functions of tensors, and loops over them, each run as one compiled graph."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, final

import optree
import torch
from torch import Tensor, fx

from bilevel.compiler import inductor
from bilevel.compiler.comparison import DifferenceError, compare
from bilevel.compiler.loop import Call, Loop, describe
from bilevel.compiler.rewriting import split
from bilevel.contract.held import Snapshot
from bilevel.errors import CompileWarning

#: Compiled graphs of one function after which new argument shapes are run in eager mode.
GRAPHS_PER_FUNCTION = 8

Made = TypeVar("Made")

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

    A graph is compared with eager mode before it is used (`compare`); of a loop, its first steps,
    and if these differ its last ones. Where they differ the call is made in eager mode, and the
    next one is compared too. If that differs again, or if the graph cannot be traced or compiled, a
    `CompileWarning` says so, and from then on this function is run in eager mode, or the loop step
    by step.

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
        self._doubted: dict[tuple[Hashable, ...], _Graph] = {}
        self._eager: set[Hashable] = set()
        self._context: Hashable = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy compiles its own graphs: those of this one belong to its functions."""
        return {
            **self.__dict__,
            "_graphs": {},
            "_doubted": {},
            "_eager": set(),
            "_context": None,
        }

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
            leaves,
            lambda: self._compile(Call(function, leaves, spec), leaves),
        )
        if graph is None:
            return function(*args)
        with torch.no_grad():
            return graph(leaves)

    def linearised(
        self, function: Callable[..., Tensor], *args: Any, vector: Tensor
    ) -> Callable[[Tensor], Tensor] | None:
        """v ↦ `function(*args, v)`: what does not depend on v is computed once, now.

        `vector` is an example of v, for which the graph is compared with eager mode before its
        first use. None where there shall be no graph.
        """
        arguments: Any = (*args, vector)
        leaves, spec = optree.tree_flatten(arguments)
        graph = self._graph(
            (function, "is run in eager mode"),
            (spec, *map(describe, leaves)),
            leaves,
            lambda: self._compile_linearised(Call(function, leaves, spec), leaves),
        )
        return None if graph is None else graph(leaves)

    @torch.no_grad()
    def scan(self, function: Callable[..., tuple[Any, Any]], *args: Any) -> tuple[Any, Any]:
        """(the last carry, all y, stacked) of the `Loop` of these arguments."""
        loop = Loop(function, *args)
        graph = self._graph(
            (function, "is run step by step"),
            loop.description(),
            loop,
            lambda: self._compile_loop(loop),
        )
        return loop.step_by_step(self) if graph is None else graph(loop)

    def _graph(
        self,
        kind: tuple[Callable[..., Any], str],
        described: Sequence[Hashable],
        given: Any,
        make: Callable[[], _Graph],
    ) -> Callable[[Any], Any] | None:
        """The graph for such arguments, made if need be; None where there shall be none.

        Before it is used it is compared with eager mode, for what is `given`. Where they differ it
        is compared again at the next call, another step perhaps: one step may be singular, as
        Adam's first is.
        """
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
                doubted = self._doubted.pop(key, None)
                graph = make() if doubted is None else doubted
                try:
                    graph.check(given)
                except DifferenceError:
                    if doubted is not None:
                        raise
                    self._doubted[key] = graph
                    return None
                self._graphs[key] = graph.run
            except (_RefusalError, DifferenceError) as refusal:
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
    def _compile(self, call: Call, leaves: Sequence[Any]) -> _Graph:
        compiled = self._traced(call.run, call.tensors(leaves))

        @torch.no_grad()
        def check(arguments: Sequence[Any]) -> None:
            tensors = call.tensors(arguments)
            compare(compiled(tensors), call.run, tensors)

        return _Graph(lambda leaves: call.arranged(compiled(call.tensors(leaves))), check)

    @torch.no_grad()
    def _compile_linearised(self, call: Call, leaves: Sequence[Any]) -> _Graph:
        def make() -> tuple[inductor.Compiled, inductor.Compiled]:
            tensors = call.tensors(leaves)
            graph, constants = inductor.trace(call.run, tensors)
            example = [*tensors, *constants]
            before, after = split(graph, len(tensors) - 1)
            saved = list(before(*example))
            first = self._built(before, example) if saved else lambda _: []
            second = self._built(after, [*example, *saved])
            return (
                lambda args: first([*args, *constants]),
                lambda args: second([*args[: len(tensors)], *constants, *args[len(tensors) :]]),
            )

        first, second = _or_refuse(make)

        def run(leaves: Sequence[Any]) -> Callable[[Tensor], Tensor]:
            tensors = call.tensors(leaves)
            with torch.no_grad():
                saved = first(tensors)

            @torch.no_grad()
            def product(vector: Tensor) -> Tensor:
                given = [*tensors[:-1], vector.detach().contiguous(), *saved]
                found: Tensor = call.arranged(second(given))
                return found

            return product

        @torch.no_grad()
        def check(leaves: Sequence[Any]) -> None:
            tensors = call.tensors(leaves)
            compare([run(leaves)(tensors[-1])], call.run, tensors)

        return _Graph(run, check)

    def _compile_loop(self, given: Loop) -> _Graph:
        loop = given.without_values()
        if self.backend != "inductor":
            first = [*given.carry, *(x[0] for x in given.xs), *given.more]
            step = self._traced(loop.step, first)

            def compiled(tensors: Sequence[Tensor], length: int) -> list[Tensor]:
                return loop.run(lambda *args: step(args), tensors, length)

        else:
            whole = _or_refuse(
                lambda: inductor.compile_scan(loop.step, given.carry, given.xs, given.more)
            )

            def compiled(tensors: Sequence[Tensor], length: int) -> list[Tensor]:
                return whole(tensors)

        def check(other: Loop) -> None:
            count = min(other.length, STEPS_COMPARED)

            def few(tensors: Sequence[Tensor]) -> None:
                compare(compiled(tensors, count), lambda *x: loop.run(loop.step, x, count), tensors)

            try:
                few([*other.carry, *(x[:count] for x in other.xs), *other.more])
            except DifferenceError:
                # The first steps of every run may be singular; the last ones are then the judge.
                before = other.length - count
                if not before:
                    raise
                until = [*other.carry, *(x[:before] for x in other.xs), *other.more]
                carry = loop.run(loop.step, until, before)[: len(loop.carry)]
                few([*carry, *(x[before:] for x in other.xs), *other.more])

        return _Graph(lambda other: loop.arranged(compiled(other.tensors, other.length)), check)

    def _traced(
        self, function: Callable[..., list[Tensor]], tensors: Sequence[Tensor]
    ) -> inductor.Compiled:
        def make() -> inductor.Compiled:
            graph, constants = inductor.trace(function, tensors)
            built = self._built(graph, [*tensors, *constants])
            return lambda args: built([*args, *constants])

        return _or_refuse(make)

    def _built(self, graph: fx.GraphModule, args: Sequence[Tensor]) -> inductor.Compiled:
        if self.backend == "inductor":
            return inductor.compile_graph(graph, args)
        called = graph if self.backend == "eager" else self.backend(graph, args)  # type: ignore[operator]
        return lambda args: list(called(*args))


@final
@dataclass(frozen=True)
class _Graph:
    """A compiled graph: how it is run, and how it is compared with eager mode, for arguments."""

    run: Callable[[Any], Any]
    check: Callable[[Any], None]


@final
class _RefusalError(Exception):
    """Why something cannot be run as a graph."""


def _or_refuse(make: Callable[[], Made]) -> Made:
    try:
        return make()
    except Exception as error:  # whatever a tracer or a compiler raises
        raise _RefusalError(
            f"it could not be compiled ({type(error).__name__}: {_first_line(error)})"
        ) from error


def constants_of(*holders: Any) -> Snapshot:
    """What functions that are traced for these objects take from them as constants: all of it."""
    return Snapshot(*holders)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"
