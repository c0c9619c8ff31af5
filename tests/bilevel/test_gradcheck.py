"""`gradcheck` finds what no look at a graph can find, and says right of what is right."""

import copy
import math

import numpy as np
import pytest
import torch
from paths import Late, Weighted, weights
from problems import DTYPE, Fixed, make, seeded
from torch import nn
from torch.func import functional_call

import bilevel
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

SGD = bilevel.optim.sgd(0.1, momentum=0.5)


def checked(problem, outer=None, optimizer=SGD, *args, **options):
    hypergradient = bilevel.Hypergradient(problem, optimizer, 4, *args, **options)
    outer = weights() if outer is None else outer
    return bilevel.gradcheck(hypergradient, outer, directions=2, generator=seeded(0))


class AlongTheRun(Weighted):
    def step_loss(self, params, outer, step, *, generator):
        return (params["theta"] ** 2).sum() * (step + 1)


@pytest.mark.parametrize("problem", [Weighted, AlongTheRun])
@pytest.mark.parametrize("truncation", [None, Fixed(1, 3), Late(2, 4)])
@pytest.mark.parametrize("estimator", [Adjoint(), Adjoint("forward"), Forward(), Reverse()])
def test_what_is_right_is_found_right(estimator, truncation, problem):
    check = checked(problem(), None, SGD, truncation, estimator)
    assert check.passed, check
    assert check.verdict.startswith("right")
    assert [each.direction for each in check.comparisons] == ["random 1", "random 2", "weights"]
    assert all(each.agrees for each in check.comparisons)
    assert check.dtype == torch.float64
    assert set(check.methods.values()) == {"the same"}


@pytest.mark.parametrize("name", ["data_cleaning", "convnet_distillation", "learned_rate"])
def test_the_problems_of_these_tests_are_right(name):
    case = make(name, 0)
    optimizer = case.optimizer(bilevel.optim.sgd, 0.05)
    hypergradient = bilevel.Hypergradient(case.problem, optimizer, 3)
    check = bilevel.gradcheck(hypergradient, case.outer, case.outer_batch, directions=1)
    assert check.passed, check


class Number(Weighted):
    """A penalty whose derivative gets lost in Python."""

    def inner_batch(self, outer, step, *, generator):
        inputs, targets, scale = super().inner_batch(outer, step, generator=generator)
        return inputs, targets, scale * math.exp(float(outer["penalty"]))

    def outer_loss(self, params, outer, batch):
        return super().outer_loss(params, outer, batch) + outer["penalty"]


class Array(Number):
    def inner_batch(self, outer, step, *, generator):
        inputs, targets, scale = Weighted.inner_batch(self, outer, step, generator=generator)
        factor = np.exp(outer["penalty"].detach().numpy())
        return inputs, targets, scale * torch.as_tensor(factor)


class Held(Number):
    def inner_batch(self, outer, step, *, generator):
        inputs, targets, scale = Weighted.inner_batch(self, outer, step, generator=generator)
        with torch.no_grad():
            factor = outer["penalty"].exp()
        return inputs, targets, scale * factor


@pytest.mark.parametrize("problem", [Number, Array, Held])
def test_a_derivative_that_is_lost_on_the_way_is_found(problem):
    outer = {**weights(), "penalty": torch.tensor(0.3, dtype=DTYPE)}
    check = checked(problem(), outer)
    assert not check.passed
    assert check.verdict.startswith("wrong in")
    found = {each.direction: each.agrees for each in check.comparisons}
    assert found["penalty"] is False
    assert found["weights"] is True
    assert "'penalty'" in check.verdict
    assert "DIFFERS" in str(check)


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(3 * x**2)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad


def test_a_wrong_backward_is_found():
    problem = Weighted()
    problem.predict = lambda params, inputs: Wrong.apply(0.3 * inputs @ params["theta"] + 0.1)
    assert checked(problem).verdict.startswith("wrong in")


def test_an_unused_variable_is_said_to_be_used_where_it_is():
    class OnlyNumber(Number):
        def outer_loss(self, params, outer, batch):
            return Weighted.outer_loss(self, params, outer, batch)

    outer = {**weights(), "penalty": torch.tensor(0.3, dtype=DTYPE)}
    check = checked(OnlyNumber(), outer)
    assert not check.passed
    assert check.verdict.startswith("refused: Adjoint refuses: nothing depends on")
    assert "the outer loss changes with 'penalty', 'weights'" in check.verdict


def test_an_impure_method_is_named():
    class Drawn(Weighted):
        def rows(self, step):
            return torch.as_tensor(np.random.default_rng().choice(20, 5))

    class Counted(Weighted):
        calls = 0

        def outer_loss(self, params, outer, batch):
            self.calls += 1
            return super().outer_loss(params, outer, batch) * self.calls

    for problem, method in ((Drawn(), "inner_batch"), (Counted(), "outer_loss")):
        check = checked(problem)
        assert not check.passed
        assert check.verdict.startswith(f"not repeatable: {method}")
        assert check.methods[method] == "SOMETHING ELSE"


@pytest.mark.parametrize(
    "estimator",
    [
        LowRank(guard=None),
        FiniteDifference(1e-4),
        Implicit(damping=1.0),
        FixedPoint(bilevel.linear.GMRES()),
        EvolutionStrategies(0.1, pairs=2),
        PersistentEvolutionStrategies(0.1, run_length=8),
    ],
)
@pytest.mark.filterwarnings("ignore::bilevel.ConvergenceWarning")
def test_what_an_estimator_leaves_out_is_no_fault_of_the_problem(estimator):
    before = copy.deepcopy(estimator.state_dict())
    check = checked(Weighted(), None, SGD, None, estimator)
    assert check.passed, check
    assert check.estimator == "Adjoint"
    assert any(estimator.leaves_out in remark for remark in check.remarks)
    assert str(estimator.state_dict()) == str(before)


class InFloat32(Weighted):
    """Data and a module in float32, in attributes and in a closure."""

    def setup(self):
        self.network = nn.Linear(4, 1)
        data = torch.randn(20, 4)
        self.data = lambda rows: data[rows]
        self.held = data

    def init(self, outer, *, generator):
        return bilevel.fresh_parameters(self.network, generator)

    def inner_batch(self, outer, step, *, generator):
        rows = self.rows(step)
        return self.data(rows), outer["weights"][rows], torch.ones(5)

    def predict(self, params, inputs):
        return functional_call(self.network, params, (inputs,))[:, 0]

    def outer_loss(self, params, outer, batch):
        return (self.predict(params, self.held) ** 2).mean()


def test_float32_is_checked_in_float64_and_left_as_it_was():
    problem = InFloat32()
    before = [*problem.network.parameters(), problem.held]
    values = [x.detach().clone() for x in before]
    addresses = [x.data_ptr() for x in before]
    check = checked(problem, {"weights": weights()["weights"].detach().float()})
    assert check.passed, check
    assert check.dtype == torch.float64
    assert all(each.uncertainty < 1e-6 for each in check.comparisons)
    assert torch.get_default_dtype() == torch.float32
    assert [x.data_ptr() for x in before] == addresses
    assert all(torch.equal(x, y) for x, y in zip(before, values, strict=True))


def test_what_insists_on_float32_is_checked_in_it_and_told():
    class Insisting(InFloat32):
        def inner_batch(self, outer, step, *, generator):
            batch = super().inner_batch(outer, step, generator=generator)
            return tuple(x.float() for x in batch)

        def init(self, outer, *, generator):
            return {k: v.float() for k, v in super().init(outer, generator=generator).items()}

    check = checked(Insisting(), {"weights": weights()["weights"].detach().float()})
    assert check.passed, check
    assert check.dtype == torch.float32
    assert any("not in float64" in remark for remark in check.remarks)


def test_only_a_number_of_directions_is_one():
    hypergradient = bilevel.Hypergradient(Weighted(), SGD, 2)
    with pytest.raises(bilevel.ConfigurationError, match="directions=-1"):
        bilevel.gradcheck(hypergradient, weights(), directions=-1)
    assert len(bilevel.gradcheck(hypergradient, weights(), directions=0).comparisons) == 1
