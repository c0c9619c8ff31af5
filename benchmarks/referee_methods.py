"""How the referee's problems are differentiated: every estimator that fits, and peers."""

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from inner_methods import AsProblem
from inner_problem import Params
from inner_processes import jax_python
from referee_peers import (
    ITERATIONS,
    first_order_by_boat,
    implicit_by_boat,
    implicit_by_hand,
    implicit_by_torchopt,
    unrolled,
)
from referee_problems import START, RefereeProblem
from referee_run import Competitor, Hypergradients, OfJax, OfTorch, nothing
from torch import Tensor

import bilevel
from bilevel import estimators as e
from bilevel import linear, truncation


@dataclass(frozen=True)
class Method:
    """A way to differentiate.

    Attributes:
        enter: Makes the competitor on a problem.
        ours: Whether it is this library's.
        needs: The packages that it imports.
    """

    enter: Callable[[RefereeProblem], Competitor]
    ours: bool = False
    needs: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Those that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def ours(
    estimator: Callable[[RefereeProblem], e.Estimator],
    *,
    window: int | None = None,
    carried_on: int | None = None,
    compile: bool = False,
) -> Method:
    """This library.

    Args:
        estimator: Made for a problem.
        window: Differentiate so many last steps; default: all.
        carried_on: Run so many inner steps a call, from where those of the last call ended.
        compile: Its inner steps and their derivatives.
    """

    def make(problem: RefereeProblem, products: list[int]) -> Hypergradients:
        # A problem that holds φ is another one, with other graphs, after every outer step.
        without = copy.copy(problem)
        without.position = {}
        made = bilevel.Hypergradient(
            AsProblem(without),
            bilevel.optim.sgd(problem.rate, momentum=0.0 if carried_on else problem.momentum),
            steps=carried_on or problem.steps,
            truncation=None if window is None else truncation.Last(window),
            estimator=estimator(problem),
            compile=compile,
        )

        start: Params = {}

        def call() -> list[Tensor]:
            result = made(problem.position | start)
            products.append(result.stats.hessian_vector_products)
            if carried_on:
                start.update({START + name: value for name, value in result.params.items()})
            return [result.grads[name] for name in problem.position]

        def restart() -> None:
            for name, value in problem.start.items():
                # In place, as what another tensor compiles is no part of a run.
                start.setdefault(START + name, value.clone()).copy_(value)
            for value in made.estimator.state_dict().values():
                value.zero_()

        if carried_on:
            restart()
        return Hypergradients(call, restart if carried_on else nothing)

    return Method(lambda problem: OfTorch(problem, make, counts=not compile), ours=True)


def peer(make: Any, *needs: str) -> Method:
    """Of PyTorch."""
    return Method(lambda problem: OfTorch(problem, make), needs=needs)


def jax(name: str) -> Method:
    """Of `referee_jax.py`."""

    def enter(problem: RefereeProblem) -> Competitor:
        products = ITERATIONS + 1 if name == "jaxopt" else problem.steps
        return OfJax(problem, name, problem.steps + products, jax_python())

    return Method(enter)


def conjugate(iterations: int) -> linear.ConjugateGradient:
    return linear.ConjugateGradient(iterations)


def whole(_: RefereeProblem) -> e.Estimator:
    return e.Adjoint()


def implicit(_: RefereeProblem) -> e.Estimator:
    return e.Implicit(conjugate(ITERATIONS))


def amigo(_: RefereeProblem) -> e.Estimator:
    return e.Implicit(conjugate(10), warm_start=True)


METHODS: dict[str, Method] = {
    "by hand": peer(unrolled("plain")),
    "by hand, CG(20)": peer(implicit_by_hand),
    "higher": peer(unrolled("higher"), "higher"),
    "torchopt": peer(unrolled("torchopt"), "torchopt"),
    "torchopt, CG(20)": peer(implicit_by_torchopt, "torchopt"),
    "boat, RAD": peer(unrolled("boat"), "boat_torch", "higher"),
    "boat, CG(20)": peer(implicit_by_boat("CG"), "boat_torch", "higher"),
    "boat, NS(20)": peer(implicit_by_boat("NS"), "boat_torch", "higher"),
    "boat, PGDO": peer(first_order_by_boat("PGDO"), "boat_torch", "higher"),
    "boat, MESO": peer(first_order_by_boat("MESO"), "boat_torch", "higher"),
    "jax + optax": jax("jax"),
    "jaxopt, CG(20)": jax("jaxopt"),
    "Adjoint": ours(whole),
    "Adjoint, compiled": ours(whole, compile=True),
    "Adjoint, Last(20)": ours(whole, window=20),
    "LowRank, Last(20)": ours(lambda _: e.LowRank(), window=20),
    "FirstOrder, Last(1)": ours(lambda _: e.FirstOrder(), window=1),
    "FiniteDifference, Last(20)": ours(lambda _: e.FiniteDifference(), window=20),
    "Implicit, CG(20)": ours(implicit),
    "Implicit, CG(20), compiled": ours(implicit, compile=True),
    "FixedPoint, GMRES(20)": ours(lambda _: e.FixedPoint(linear.GMRES(20))),
    "Penalty": ours(lambda p: e.Penalty(100.0, p.steps)),
    "ValueFunction": ours(lambda p: e.ValueFunction(1.0, p.steps)),
    "MoreauEnvelope": ours(lambda p: e.MoreauEnvelope(100.0, 10.0, p.steps)),
    "Forward, 4 directions": ours(lambda _: e.Forward(4)),
    "EvolutionStrategies": ours(lambda _: e.EvolutionStrategies(0.1, 2)),
    "AmIGO": ours(amigo, carried_on=10),
    "AmIGO, compiled": ours(amigo, carried_on=10, compile=True),
    "SOBA": ours(lambda p: e.Implicit(linear.Neumann(p.rate, 1), warm_start=True), carried_on=1),
}


def left_out() -> dict[str, str]:
    """Why, by the name of the method."""
    return {
        name: f"left out: {' and '.join(missing)} not installed (`make bench` installs the peers)"
        for name, method in METHODS.items()
        if (missing := method.missing())
    }
