"""The peers of the referee: loops by hand, and what other libraries document.

hypertorch is not among them: it is in a git repository alone, which has no release to ask a package
index for (the package of that name is another), so no result here could name what made it.
"""

from typing import Any

import torch
from inner_boat import boat
from inner_implicit import conjugate_gradients
from inner_methods import METHODS as UNROLLED
from inner_problem import Params
from referee_problems import RefereeProblem
from referee_run import Hypergradients
from torch import Tensor
from torch.autograd import grad

#: Of conjugate gradients and of Neumann series.
ITERATIONS = 20


def unrolled(name: str) -> Any:
    """A method of `inner_methods.py`, whose products are one for every step."""

    def make(problem: RefereeProblem, products: list[int]) -> Hypergradients:
        made = UNROLLED[name](problem)

        def call() -> list[Tensor]:
            products.append(problem.steps)
            return made()

        return Hypergradients(call)

    return make


def run(problem: RefereeProblem, outer: Params) -> Params:
    """The inner run without its graph."""
    params = {name: value.clone().requires_grad_() for name, value in problem.start.items()}
    optimizer = torch.optim.SGD(params.values(), lr=problem.rate, momentum=problem.momentum)
    batch = {name: value.detach() for name, value in problem.batch(outer, 0).items()}
    for _ in range(problem.steps):
        optimizer.zero_grad()
        problem.inner_loss(params, batch).backward()
        optimizer.step()
    return params


def implicit_by_hand(problem: RefereeProblem, products: list[int]) -> Hypergradients:
    """The textbook: conjugate gradients on one graph of the inner gradient."""
    outer = problem.leaves()

    def call() -> list[Tensor]:
        params = run(problem, outer)
        leaves, phi = list(params.values()), list(outer.values())
        loss = problem.inner_loss(params, problem.batch(outer, 0))
        gradient = grad(loss, leaves, create_graph=True)
        slope = grad(
            problem.outer_loss(params, outer),
            leaves + phi,
            allow_unused=True,
            materialize_grads=True,
        )
        x = conjugate_gradients(gradient, leaves, slope[: len(leaves)], ITERATIONS)
        products.append(ITERATIONS + 1)
        mixed = grad(gradient, phi, x)
        return [a - b for a, b in zip(slope[len(leaves) :], mixed, strict=True)]

    return Hypergradients(call)


def implicit_by_torchopt(problem: RefereeProblem, products: list[int]) -> Hypergradients:
    """TorchOpt's `custom_root` with conjugate gradients."""
    import torchopt

    outer = problem.leaves()
    names, keys = list(problem.start), list(outer)

    def inner(params: tuple[Tensor, ...], *phi: Tensor) -> Tensor:
        batch = problem.batch(dict(zip(keys, phi, strict=True)), 0)
        return problem.inner_loss(dict(zip(names, params, strict=True)), batch)

    @torchopt.diff.implicit.custom_root(
        torch.func.grad(inner),
        argnums=tuple(range(1, 1 + len(keys))),
        solve=torchopt.linear_solve.solve_cg(maxiter=ITERATIONS, rtol=0.0, atol=0.0),
    )
    def optimum(params: tuple[Tensor, ...], *phi: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            found = run(problem, dict(zip(keys, phi, strict=True)))
        return tuple(value.detach() for value in found.values())

    def call() -> list[Tensor]:
        phi = list(outer.values())
        params = optimum(tuple(problem.start.values()), *phi)
        products.append(ITERATIONS + 1)
        loss = problem.outer_loss(dict(zip(names, params, strict=True)), outer)
        return list(grad(loss, phi))

    return Hypergradients(call)


def implicit_by_boat(operation: str) -> Any:
    """BOAT's "CG" or "NS" after its naive gradient descent."""

    def make(problem: RefereeProblem, products: list[int]) -> Hypergradients:
        made = boat(
            problem,
            gm_op=["NGD"],
            na_op=[operation],
            CG={"k": ITERATIONS, "tolerance": 0.0, "gamma": 1.0},
            NS={"k": ITERATIONS},
        )

        def call() -> list[Tensor]:
            products.append(ITERATIONS + 1)
            return made()

        return Hypergradients(call)

    return make


def first_order_by_boat(operation: str) -> Any:
    """BOAT's "PGDO" or "MESO", single loops: θ goes on from where the last call left it.

    PGDO has the penalty 100 of `Penalty` here, by which its gradient is divided, and 10 steps a
    call; MESO the settings of its documentation, with the inner rate for both of its own.
    """

    def make(problem: RefereeProblem, products: list[int]) -> Hypergradients:
        penalty = 100.0
        settings: dict[str, Any] = {
            "PGDO": {
                "y_hat_lr": problem.rate,
                "gamma_init": penalty,
                "gamma_max": penalty,
                "gamma_argmax_step": 1,
                "update_y_ahead": False,
                "penalty": "difference",
            },
            "MESO": {"eta": problem.rate, "gamma_1": 1.0, "c0": 0.5, "y_hat_lr": problem.rate},
        }
        made = None

        def call() -> list[Tensor]:
            scale = penalty if operation == "PGDO" else 1.0
            return [scale * value for value in made()]  # type: ignore[misc]

        def restart() -> None:
            nonlocal made
            made = boat(problem, fo_op=operation, lower_iters=10, **settings)

        restart()
        return Hypergradients(call, restart)

    return make
