"""One step of everything: θ and the solution of the linear system go on from step to step."""

import re
import warnings
from pathlib import Path

import problems
import pytest
import torch
from problems import DTYPE, relative_error, seeded

import bilevel
from bilevel.estimators import Implicit, Penalty
from bilevel.linear import ConjugateGradient, Neumann

PAGE = Path(__file__).parents[2] / "docs" / "estimators.md"
RATE = 0.25

pytestmark = pytest.mark.filterwarnings("ignore::bilevel.ConvergenceWarning")


class CarriedOn(problems.Quadratic):
    """The inner run starts where the last one ended."""

    def init(self, outer, *, generator):
        return {"theta": outer["start"]}


def bilevel_quadratic():
    """(a problem with curvatures in [1, 3], c, φ* of the whole bilevel problem)."""
    case = problems.make("quadratic", 0)
    basis = torch.linalg.qr(case.problem.A)[0]
    A = basis @ torch.diag(torch.linspace(1, 3, 4, dtype=DTYPE)) @ basis.T
    problem = CarriedOn(A, case.problem.B, case.problem.start)
    sensitivity = torch.linalg.solve(A, problem.B)
    eye = torch.eye(sensitivity.shape[1], dtype=DTYPE)
    normal = sensitivity.T @ sensitivity + problem.penalty * eye
    optimum = torch.linalg.solve(normal, sensitivity.T @ case.outer_batch)
    return problem, case.outer_batch, optimum


def descend(problem, batch, estimator, outer_steps=500):
    """φ after so many outer steps of one inner step each."""
    hypergradient = bilevel.Hypergradient(problem, bilevel.optim.sgd(RATE), 1, estimator=estimator)
    outer = {"phi": torch.zeros(3, dtype=DTYPE), "start": problem.start}
    for _ in range(outer_steps):
        result = hypergradient(outer, batch, seeded(0))
        outer = {
            "phi": outer["phi"] - 0.1 * result.grads["phi"],
            "start": result.params["theta"],
        }
    return outer["phi"]


@pytest.mark.parametrize(
    "solver",
    [Neumann(RATE, 1, tolerance=1e-12), ConjugateGradient(2, tolerance=1e-12)],
    ids=["soba", "amigo"],
)
def test_the_loop_comes_to_rest_at_the_solution(solver):
    problem, batch, optimum = bilevel_quadratic()
    found = descend(problem, batch, Implicit(solver, warm_start=True))
    assert relative_error(found, optimum) < 1e-6


def test_without_the_warm_start_it_rests_elsewhere():
    problem, batch, optimum = bilevel_quadratic()
    assert relative_error(descend(problem, batch, Implicit(Neumann(RATE, 1))), optimum) > 0.1


@pytest.mark.slow
def test_a_penalty_in_a_single_loop():
    """Thirty further steps an outer step, from where the last run ended; the bias is O(1/λ)."""
    problem, batch, optimum = bilevel_quadratic()
    found = descend(problem, batch, Penalty(1e3, 30), 300)
    assert relative_error(found, optimum) < 1e-2


def test_the_solution_is_saved_and_goes_on():
    problem, batch, _ = bilevel_quadratic()
    outer = {"phi": torch.ones(3, dtype=DTYPE), "start": problem.start}

    def fresh():
        estimator = Implicit(Neumann(RATE, 1), warm_start=True)
        return estimator, bilevel.Hypergradient(
            problem, bilevel.optim.sgd(RATE), 1, None, estimator
        )

    estimator, whole = fresh()
    whole(outer, batch, seeded(0))
    other, resumed = fresh()
    other.load_state_dict(estimator.state_dict())
    expected, found = (made(outer, batch, seeded(1)).grads["phi"] for made in (whole, resumed))
    assert torch.equal(expected, found)


def test_the_program_on_the_page():
    """It ends near the penalties at which the held-out loss is lowest."""
    (program,) = [
        block
        for block in re.findall(
            r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE
        )
        if "warm_start=True" in block
    ]
    names = {}
    with warnings.catch_warnings():
        exec(compile(program, str(PAGE), "exec"), names)
    exact = bilevel.Hypergradient(
        names["Ridge"](names["inputs"], names["targets"]),
        bilevel.optim.sgd(0.3),
        300,
        estimator=Implicit(),
    )
    batch = (names["held_out"], names["answers"])
    outer = {"log_penalty": names["log_penalty"].detach(), "start": torch.zeros(5)}
    at_end = exact(outer, batch, seeded(0))
    at_start = exact(outer | {"log_penalty": torch.full((5,), -1.0)}, batch, seeded(0))
    assert relative_error(names["result"].params, at_end.params) < 1e-2
    assert float(at_end.loss) < float(at_start.loss)
    assert float(at_end.grads["log_penalty"].norm()) < 0.2 * float(
        at_start.grads["log_penalty"].norm()
    )
