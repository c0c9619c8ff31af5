"""Which estimators go on from what the call before left: as declared, as saved, as computed."""

import problems
import pytest
import torch
from problems import flat, seeded

import bilevel
from bilevel.basis import Eigenvectors
from bilevel.estimators import (
    Adjoint,
    EvolutionStrategies,
    FiniteDifference,
    FirstOrder,
    FixedPoint,
    Forward,
    Implicit,
    LowRank,
    MoreauEnvelope,
    Penalty,
    PersistentEvolutionStrategies,
    Reverse,
    ValueFunction,
)
from bilevel.linear import ConjugateGradient

INDEPENDENT = {
    "adjoint": Adjoint,
    "reverse": Reverse,
    "forward": Forward,
    "finite_difference": FiniteDifference,
    "first_order": FirstOrder,
    "evolution_strategies": lambda: EvolutionStrategies(0.1, 2),
    "implicit": lambda: Implicit(damping=0.1),
    "penalty": Penalty,
    "moreau_envelope": MoreauEnvelope,
    "value_function": ValueFunction,
    "fixed_point": FixedPoint,
    "krylov": lambda: LowRank(guard=None),
    "eigenvectors": lambda: LowRank(Eigenvectors(2), guard=None),
}
CARRYING = {
    "its particles": lambda: PersistentEvolutionStrategies(0.1, run_length=30),
    "its eigenvectors (refresh_every=3)": lambda: LowRank(
        Eigenvectors(1, refresh_every=3, refresh_change=1e9), guard=None
    ),
    "the solution of its linear system (warm_start=True)": lambda: Implicit(
        ConjugateGradient(1, tolerance=1e-12), damping=0.1, warm_start=True
    ),
}

pytestmark = pytest.mark.filterwarnings("ignore::bilevel.ConvergenceWarning")


def solver(estimator):
    case = problems.make("data_cleaning", 0)
    hypergradient = bilevel.Hypergradient(
        case.problem, bilevel.optim.sgd(0.1), 6, problems.Fixed(1, 6), estimator
    )
    return lambda seed: flat(hypergradient(case.outer, case.outer_batch, seeded(seed)).grads)


def after_another_call(make):
    """(the estimator, its second result, what a fresh one gives in its place)."""
    estimator = make()
    used, fresh = solver(estimator), solver(make())
    used(0)
    return estimator, used(1), fresh(1)


@pytest.mark.parametrize("name", sorted(INDEPENDENT))
def test_what_carries_nothing_over_gives_what_a_fresh_one_does(name):
    estimator, used, fresh = after_another_call(INDEPENDENT[name])
    assert estimator.carries_over == ""
    assert estimator.state_dict() == {}
    torch.testing.assert_close(used, fresh, rtol=0, atol=0)


@pytest.mark.parametrize("what", sorted(CARRYING))
def test_what_carries_something_over_says_what_and_saves_it(what):
    estimator, used, fresh = after_another_call(CARRYING[what])
    assert estimator.carries_over == what
    assert estimator.state_dict() != {}
    assert not torch.allclose(used, fresh, rtol=1e-6, atol=0)


@pytest.mark.parametrize("what", sorted({*CARRYING} - {"its particles"}))
def test_replicas_would_take_over_another_ones(what):
    case, estimator = problems.make("data_cleaning", 0), CARRYING[what]()
    assert not estimator.carries_over_by_replica
    with pytest.raises(bilevel.ConfigurationError, match="another one's"):
        bilevel.Hypergradient(
            case.problem, bilevel.optim.sgd(0.1), 6, estimator=estimator, inner_replicas=2
        )
