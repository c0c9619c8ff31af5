"""A gradient of zero: what each estimator may conclude from it, and what it may not."""

import problems
import pytest
import torch
from problems import DTYPE, seeded

import bilevel
from bilevel.estimators import (
    Adjoint,
    EvolutionStrategies,
    FiniteDifference,
    PersistentEvolutionStrategies,
)
from bilevel.truncation import Last

CERTAIN = "is exactly zero through the window"
UNSURE = "as far as this estimator can see"


class TwoBatches(bilevel.Problem):
    """One variable in the batches of even steps, another in those of odd ones."""

    def __init__(self, distance=torch.square):
        self.distance = distance

    def init(self, outer, *, generator):
        return torch.zeros(3, dtype=DTYPE)

    def inner_batch(self, outer, step, *, generator):
        return outer["odd"] if step % 2 else outer["even"]

    def inner_loss(self, params, batch):
        return 0.5 * self.distance(params - batch).sum()

    def outer_loss(self, params, outer, batch):
        return 0.5 * ((params - 1) ** 2).sum()


def outer():
    return {"even": torch.full((3,), 2.0, dtype=DTYPE), "odd": torch.ones(3, dtype=DTYPE)}


def status(problem, estimator, truncation=None, variables=None, steps=4):
    made = bilevel.Hypergradient(problem, bilevel.optim.sgd(0.5), steps, truncation, estimator)
    return made(outer() if variables is None else variables, None, seeded(0)).stats.status


@pytest.mark.parametrize("once", [False, True])
def test_a_variable_outside_the_window_is_known_to_have_no_part_in_it(once):
    distance = problems.OnceDifferentiable.apply if once else torch.square
    found = status(TwoBatches(distance), FiniteDifference(1e-4), Last(1))
    assert found == status(TwoBatches(), Adjoint(), Last(1))
    assert "['even'] is exactly zero through the window [3, 4)" in found
    assert UNSURE not in found


@pytest.mark.parametrize("once", [False, True])
def test_a_variable_that_nothing_uses_is_still_an_error(once):
    problem = TwoBatches(problems.OnceDifferentiable.apply if once else torch.square)
    for estimator in (Adjoint(), FiniteDifference()) if not once else (FiniteDifference(),):
        with pytest.raises(bilevel.UnusedOuterVariableError, match="forgotten"):
            status(problem, estimator, None, outer() | {"forgotten": torch.ones(2, dtype=DTYPE)})


def test_differences_do_not_call_a_plateau_exact():
    """Of |θ − b| the gradient is a sign, which differences cannot see change."""
    problem = TwoBatches(torch.abs)
    assert UNSURE not in status(problem, Adjoint())
    found = status(problem, FiniteDifference(1e-6))
    assert CERTAIN in found
    assert UNSURE in found


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("name", ["plain", "persistent"])
def test_a_plateau_of_the_outer_loss_is_no_proof_that_a_variable_is_unused(name, pairs):
    class Steps(TwoBatches):
        def outer_loss(self, params, outer, batch):
            return (params > 10).to(DTYPE).mean()

    estimator = (
        EvolutionStrategies(0.1, pairs)
        if name == "plain"
        else PersistentEvolutionStrategies(0.1, 8, pairs)
    )
    found = status(Steps(), estimator)
    assert "['even', 'odd']" in found
    assert UNSURE in found
