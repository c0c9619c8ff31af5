"""One hypergradient at an inner optimum, by conjugate gradients: of this library and by hand."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from inner_methods import AsProblem, Call
from inner_problem import InnerProblem, Params
from inner_problems import Penalties
from torch import Tensor
from torch.autograd import grad

import bilevel

#: By the name in the table: iterations of the solver.
ITERATIONS = {"implicit-10": 10, "implicit-50": 50}


def inner_optimum(
    problem: InnerProblem, outer: Params, start: Params | None = None, tolerance: float = 1e-11
) -> Params:
    """θ* for some outer variables, by L-BFGS, in the problem's dtype.

    Args:
        problem: Whose inner loss is the same at every step.
        outer: φ.
        start: Default: the problem's.
        tolerance: Of the largest entry of the gradient.
    """
    begin = problem.start if start is None else start
    params = {name: value.clone().requires_grad_() for name, value in begin.items()}
    batch = {name: value.detach() for name, value in problem.batch(outer, 0).items()}
    optimizer = torch.optim.LBFGS(
        list(params.values()),
        max_iter=3000,
        tolerance_grad=tolerance,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.inner_loss(params, batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    return {name: value.detach() for name, value in params.items()}


class Optimum:
    """`Penalties` at its inner optimum, found in float64.

    Args:
        iterations: Of conjugate gradients.

    Attributes:
        problem: With θ* as its start.
    """

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations
        self._double = double = Penalties().double()
        self._params = inner_optimum(double, double.outer)
        self.problem = Penalties()
        self.problem.start = {name: value.float() for name, value in self._params.items()}

    def exact(self) -> list[Tensor]:
        """The hypergradient, by a dense solve in float64."""
        problem, outer = self._double, self._double.leaves()
        params = {name: value.clone().requires_grad_() for name, value in self._params.items()}
        leaves = list(params.values())
        loss = problem.inner_loss(params, problem.batch(outer, 0))
        gradient = torch.cat([each.ravel() for each in grad(loss, leaves, create_graph=True)])
        rows = [grad(entry, leaves, retain_graph=True) for entry in gradient]
        hessian = torch.stack([torch.cat([each.ravel() for each in row]) for row in rows])
        slope = grad(problem.outer_loss(params, outer), leaves)
        x = torch.linalg.solve(hessian, torch.cat([each.ravel() for each in slope]))
        return list(grad(gradient, list(outer.values()), -x))

    def tensors(self) -> dict[str, Tensor]:
        return self.problem.tensors()

    def settings(self) -> dict[str, Any]:
        return {**self.problem.settings(), "iterations": self.iterations}


def plain(optimum: Optimum) -> Call:
    """The textbook's loop on one graph of the gradient."""
    problem = optimum.problem
    outer = problem.leaves()

    def call() -> list[Tensor]:
        params = {name: value.detach().requires_grad_() for name, value in problem.start.items()}
        leaves = list(params.values())
        gradient = grad(
            problem.inner_loss(params, problem.batch(outer, 0)), leaves, create_graph=True
        )
        slope = grad(problem.outer_loss(params, outer), leaves)
        x = conjugate_gradients(gradient, leaves, slope, optimum.iterations)
        return list(grad(gradient, list(outer.values()), [-value for value in x]))

    return call


def conjugate_gradients(
    gradient: Sequence[Tensor], leaves: list[Tensor], slope: Sequence[Tensor], iterations: int
) -> list[Tensor]:
    """The x of Hx = slope, where H is the derivative of `gradient` by `leaves`."""
    residual = list(slope)
    x, direction = [torch.zeros_like(value) for value in leaves], residual
    size = dot(residual, residual)
    for _ in range(iterations):
        product = grad(gradient, leaves, direction, retain_graph=True)
        along = size / dot(direction, product)
        x = [a + along * b for a, b in zip(x, direction, strict=True)]
        residual = [a - along * b for a, b in zip(residual, product, strict=True)]
        size, before = dot(residual, residual), size
        direction = [a + size / before * b for a, b in zip(residual, direction, strict=True)]
    return x


def dot(left: Any, right: Any) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def ours(optimum: Optimum, **settings: Any) -> Call:
    outer = optimum.problem.leaves()
    # One step that leaves the optimum where it is.
    made = bilevel.Hypergradient(
        AsProblem(optimum.problem),
        bilevel.optim.sgd(0.0),
        steps=1,
        estimator=bilevel.estimators.Implicit(
            bilevel.linear.ConjugateGradient(optimum.iterations, tolerance=1e-12)
        ),
        **settings,
    )

    def call() -> list[Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bilevel.ConvergenceWarning)
            return list(made(outer).grads.values())

    return call


def compiled(optimum: Optimum) -> Call:
    return ours(optimum, compile=True)


METHODS = {"plain": plain, "ours": ours, "compiled": compiled}
