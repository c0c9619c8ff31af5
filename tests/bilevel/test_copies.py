"""A `Hypergradient` is copied and pickled as it stands, before and after it was used."""

import copy
import pickle

import problems
import pytest
import torch
from problems import flat, seeded

import bilevel
from bilevel.compiler import Compiler
from bilevel.estimators import (
    Adjoint,
    EvolutionStrategies,
    FiniteDifference,
    FixedPoint,
    Forward,
    Implicit,
    LowRank,
    PersistentEvolutionStrategies,
    Reverse,
)

ESTIMATORS = [
    Adjoint(),
    Adjoint("forward"),
    Reverse(),
    Forward(),
    LowRank(guard=None),
    Implicit(damping=1.0, warm_start=True),
    FixedPoint(bilevel.linear.GMRES(), batches=2),
    FiniteDifference(),
    EvolutionStrategies(0.1, pairs=2),
    PersistentEvolutionStrategies(0.1, run_length=12),
]


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.filterwarnings("ignore::bilevel.ConvergenceWarning")
def test_a_copy_goes_on_as_the_original_does(estimator, copied):
    case = problems.make("ridge", 0)
    optimizer = bilevel.optim.chain(bilevel.optim.clip_by_norm(1.0), bilevel.optim.adam(0.1))
    original = bilevel.Hypergradient(
        case.problem, optimizer, 6, bilevel.truncation.RandomWindow(4), copy.deepcopy(estimator)
    )
    for seed in range(3):
        other = copied(original)
        one, two = (x(case.outer, case.outer_batch, seeded(seed)) for x in (original, other))
        assert one.window == two.window
        assert torch.equal(flat(one.grads), flat(two.grads))
        assert one.stats.status == two.stats.status


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_compiles_graphs_of_its_own(copied):
    case = problems.make("ridge", 0)
    original = bilevel.Hypergradient(case.problem, bilevel.optim.sgd(0.1), 2, compile=True)
    original.inner.compiler = Compiler(backend="eager")
    expected = original(case.outer, case.outer_batch, seeded(0))
    other = copied(original)
    other.inner.problem.targets = 2 * case.problem.targets
    changed = other(case.outer, case.outer_batch, seeded(0))
    again = original(case.outer, case.outer_batch, seeded(0))
    assert torch.equal(flat(again.grads), flat(expected.grads))
    assert not torch.equal(flat(changed.grads), flat(expected.grads))


def test_a_copy_of_a_problem_of_functions_is_its_own():
    problem = bilevel.Problem.from_functions(
        init=torch.zeros_like,
        inner_loss=torch.nn.MSELoss(),
        outer_loss=lambda params, outer, batch: (params - 1).square().sum(),
    )
    original = bilevel.Hypergradient(problem, bilevel.optim.sgd(0.5), 3)
    one, two = (x(torch.full((3,), 2.0)).grads for x in (original, copy.deepcopy(original)))
    assert torch.equal(one, two)
