"""Whatever the package makes can be sent to another process and copied, and then does the same."""

import copy
import inspect
import pickle

import problems
import pytest
import torch
from optimizers import ONE_OF_EACH
from problems import flat, seeded

import bilevel
from bilevel import basis, clip, estimators, linear, truncation
from bilevel.compiler import Compiler

pytestmark = pytest.mark.filterwarnings("ignore::bilevel.ConvergenceWarning")

ESTIMATORS = [
    estimators.Adjoint(), estimators.EvolutionStrategies(0.1, 2), estimators.FiniteDifference(),
    estimators.FirstOrder(), estimators.FixedPoint(linear.Dense()), estimators.Forward(2),
    estimators.Implicit(damping=0.1, warm_start=True), estimators.LowRank(guard=None),
    estimators.MoreauEnvelope(steps=5), estimators.Penalty(steps=5),
    estimators.PersistentEvolutionStrategies(0.1, 20, 2), estimators.Reptile(),
    estimators.Reverse(), estimators.ValueFunction(steps=5),
]  # fmt: skip
SOLVERS = [
    linear.ConjugateGradient(), linear.Dense(), linear.GMRES(), linear.Neumann(0.1),
    linear.NormalConjugateGradient(), linear.Nystrom(2), linear.RandomizedEigendecomposition(2),
]  # fmt: skip
BASES = [basis.Eigenvectors(3, 2, 1), basis.Krylov()]
CLIPS = [clip.MovingAverageClip(), clip.MovingAverageRowClip()]
DISTRIBUTIONS = [truncation.EffectiveSteps(0.5), truncation.Softmax()]
TRANSITIONS = [truncation.ByFraction(), truncation.ByMetric("accuracy")]
SCHEDULES = [
    truncation.Full(), truncation.Last(3), truncation.LogUniform(2), truncation.Pessimistic(),
    truncation.RandomWindow(3), truncation.StageAware(3, 1, truncation.ByFraction()),
    truncation.WithinTrajectoryPolicy(3, 1), truncation.MinimumDistance(),
]  # fmt: skip
WAYS = {
    "pickled": lambda value: pickle.loads(pickle.dumps(value)),
    "copied": copy.deepcopy,
}
every_way = pytest.mark.parametrize("way", WAYS)


def name(value):
    return type(value).__name__


def test_one_of_every_class_is_here():
    """Of those that a user makes and hands over."""
    given = ESTIMATORS + SOLVERS + BASES + CLIPS + DISTRIBUTIONS + TRANSITIONS + SCHEDULES
    made = {each: getattr(package, each)
            for package in (estimators, linear, basis, clip, truncation)
            for each in package.__all__}  # fmt: skip
    bases = (
        estimators.Estimator, linear.Solver, basis.Basis, clip.Clip, truncation.Truncation,
        truncation.StepDistribution, truncation.Transition,
    )  # fmt: skip
    wanted = {
        each
        for each, value in made.items()
        if inspect.isclass(value) and issubclass(value, bases) and not inspect.isabstract(value)
    }
    assert wanted == {name(value) for value in given}


class Start(problems.DataCleaning):
    """The initialisation is learned, and nothing else."""

    def init(self, outer, *, generator):
        return {"weight": outer[0]}

    def inner_batch(self, outer, step, *, generator):
        ones = torch.ones(len(self.labels), dtype=problems.DTYPE)
        return super().inner_batch([ones], step, generator=generator)


def learned_start():
    case = problems.make("data_cleaning", 0)
    problem = Start(case.problem.inputs, case.problem.labels, case.problem.size)
    start = torch.zeros(problem.inputs.shape[1], 3, dtype=problems.DTYPE)
    return problems.Case(problem, [start], case.outer_batch)


def same_calls(hypergradient, way, case=None):
    """A copy made before the first call, and one made after it, go on as the original does."""
    case = problems.make("data_cleaning", 0) if case is None else case

    def call(made, seed):
        result = made(case.outer, case.outer_batch, seeded(seed))
        return torch.cat([flat(result.grads), flat(result.params), result.loss.reshape(1)])

    before = WAYS[way](hypergradient)
    first = call(hypergradient, 0)
    assert torch.equal(call(before, 0), first)
    after = WAYS[way](hypergradient)
    second = call(hypergradient, 1)
    assert torch.equal(call(after, 1), second)
    assert not torch.equal(first, second)


def made(optimizer=None, schedule=None, estimator=None, **settings):
    problem = problems.make("data_cleaning", 0).problem
    optimizer = bilevel.optim.adam(0.1) if optimizer is None else optimizer
    return bilevel.Hypergradient(problem, optimizer, 6, schedule, estimator, **settings)


@every_way
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=name)
def test_of_every_estimator(estimator, way):
    estimator, optimizer = copy.deepcopy(estimator), bilevel.optim.sgd(0.1, momentum=0.5)
    if isinstance(estimator, estimators.Reptile):
        case = learned_start()
        same_calls(bilevel.Hypergradient(case.problem, optimizer, 6, None, estimator), way, case)
    else:
        same_calls(made(optimizer, None, estimator), way)


@every_way
@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_of_every_solver(solver, way):
    estimator = estimators.Implicit(solver, damping=0.3)
    same_calls(made(bilevel.optim.sgd(0.1), None, estimator), way)


@every_way
@pytest.mark.parametrize("basis", BASES, ids=name)
def test_of_every_basis(basis, way):
    same_calls(made(None, None, estimators.LowRank(copy.deepcopy(basis), guard=None)), way)


@every_way
@pytest.mark.parametrize("schedule", SCHEDULES[:-1], ids=name)
def test_of_every_schedule(schedule, way):
    same_calls(made(None, copy.deepcopy(schedule)), way)


@every_way
@pytest.mark.parametrize("optimizer", sorted(set(ONE_OF_EACH) - {"freeze"}))
def test_of_every_optimizer(optimizer, way):
    same_calls(made(ONE_OF_EACH[optimizer]), way)


@every_way
def test_of_settings(way):
    settings = {"keep_every": 2, "keep_on": "cpu", "graph_budget": 0, "inner_replicas": 2}
    same_calls(made(**settings), way)


@every_way
@pytest.mark.parametrize("value", CLIPS + DISTRIBUTIONS + TRANSITIONS + SCHEDULES[-1:], ids=name)
def test_of_what_is_not_called_here(value, way):
    again = WAYS[way](value)
    assert type(again) is type(value)
    assert again.__dict__ == value.__dict__


@every_way
def test_a_copy_compiles_graphs_of_its_own(way):
    case = problems.make("ridge", 0)
    original = bilevel.Hypergradient(case.problem, bilevel.optim.sgd(0.1), 2, compile=True)
    original.inner.compiler = Compiler(backend="eager")
    expected = original(case.outer, case.outer_batch, seeded(0))
    other = WAYS[way](original)
    other.inner.problem.targets = 2 * case.problem.targets
    changed = other(case.outer, case.outer_batch, seeded(0))
    again = original(case.outer, case.outer_batch, seeded(0))
    assert torch.equal(flat(again.grads), flat(expected.grads))
    assert not torch.equal(flat(changed.grads), flat(expected.grads))


def test_a_problem_of_functions_that_have_a_name():
    problem = bilevel.Problem.from_functions(
        init=torch.zeros_like, inner_loss=torch.nn.MSELoss(), outer_loss=ended_at
    )
    original = bilevel.Hypergradient(problem, bilevel.optim.sgd(0.5), 3)
    for way in WAYS.values():
        one, two = (x(torch.full((3,), 2.0)).grads for x in (original, way(original)))
        assert torch.equal(one, two)


def ended_at(params, outer, batch):
    return (params - 1).square().sum()
