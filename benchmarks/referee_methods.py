"""How the referee's problems are differentiated: every estimator that fits, and peers."""

import importlib.util
from collections.abc import Callable
from typing import Any

import inner_methods
from inner_methods import AsProblem, Call
from referee_problems import RefereeProblem
from torch import Tensor

import bilevel
from bilevel import estimators as e
from bilevel import linear, truncation

#: The hypergradient of a problem at its `position`, and how many Hessian-vector products it took.
Make = Callable[[RefereeProblem, list[int]], Call]


def ours(
    estimator: Callable[[RefereeProblem], e.Estimator],
    *,
    window: int | None = None,
    carried_on: int | None = None,
) -> Make:
    """This library.

    Args:
        estimator: Made for a problem.
        window: Differentiate so many last steps; default: all.
        carried_on: Run so many inner steps a call, from where those of the last call ended.
    """

    def make(problem: RefereeProblem, products: list[int]) -> Call:
        made = bilevel.Hypergradient(
            AsProblem(problem),
            bilevel.optim.sgd(problem.rate, momentum=0.0 if carried_on else problem.momentum),
            steps=carried_on or problem.steps,
            truncation=None if window is None else truncation.Last(window),
            estimator=estimator(problem),
        )

        def call() -> list[Tensor]:
            result = made(problem.position)
            products.append(result.stats.hessian_vector_products)
            if carried_on:
                problem.start = result.params
            return list(result.grads.values())

        return call

    return make


def peer(name: str) -> Make:
    """A method of `inner_methods.py`, whose products are one for every step."""

    def make(problem: RefereeProblem, products: list[int]) -> Call:
        made = inner_methods.METHODS[name](problem)

        def call() -> list[Tensor]:
            products.append(problem.steps)
            return made()

        return call

    return make


def conjugate(iterations: int) -> linear.ConjugateGradient:
    return linear.ConjugateGradient(iterations)


METHODS: dict[str, Make] = {
    "by hand": peer("plain"),
    "higher": peer("higher"),
    "torchopt": peer("torchopt"),
    "Adjoint": ours(lambda _: e.Adjoint()),
    "Adjoint, hvp=forward": ours(lambda _: e.Adjoint("forward")),
    "Adjoint, Last(20)": ours(lambda _: e.Adjoint(), window=20),
    "LowRank, Last(20)": ours(lambda _: e.LowRank(), window=20),
    "FirstOrder, Last(1)": ours(lambda _: e.FirstOrder(), window=1),
    "FiniteDifference, Last(20)": ours(lambda _: e.FiniteDifference(), window=20),
    "Implicit, CG(20)": ours(lambda _: e.Implicit(conjugate(20))),
    "FixedPoint, GMRES(20)": ours(lambda _: e.FixedPoint(linear.GMRES(20))),
    "Penalty": ours(lambda p: e.Penalty(100.0, p.steps)),
    "ValueFunction": ours(lambda p: e.ValueFunction(1.0, p.steps)),
    "MoreauEnvelope": ours(lambda p: e.MoreauEnvelope(100.0, 10.0, p.steps)),
    "Forward, 4 directions": ours(lambda _: e.Forward(4)),
    "EvolutionStrategies": ours(lambda _: e.EvolutionStrategies(0.1, 2)),
    "AmIGO": ours(lambda _: e.Implicit(conjugate(10), warm_start=True), carried_on=10),
    "SOBA": ours(lambda p: e.Implicit(linear.Neumann(p.rate, 1), warm_start=True), carried_on=1),
}


def available() -> list[str]:
    """Names of the methods whose library is installed."""
    packages: dict[str, Any] = {"higher": "higher", "torchopt": "torchopt"}
    return [
        name
        for name in METHODS
        if name not in packages or importlib.util.find_spec(packages[name]) is not None
    ]
