"""What would make a hypergradient silently wrong is an error before it can."""

import problems
import pytest
import torch
from problems import seeded
from torch import nn

import bilevel

ESTIMATORS = [
    bilevel.estimators.Reverse(),
    bilevel.estimators.Adjoint(),
    bilevel.estimators.Adjoint("forward"),
    bilevel.estimators.Forward(),
    bilevel.estimators.LowRank(guard=None),
]
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def test_dropout_in_the_inner_model_is_refused():
    network = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    case = problems.make("mlp_distillation", 0)
    hypergradient = bilevel.Hypergradient(problems.Distillation(network), bilevel.optim.sgd(0.1), 3)
    with pytest.raises(bilevel.ProblemError, match="global generator"):
        hypergradient(case.outer, case.outer_batch, seeded(0))
    network.eval()
    assert hypergradient(case.outer, case.outer_batch, seeded(0)).stats.status == "ok"


def test_a_batch_that_is_made_again_from_the_global_generator_is_refused():
    class Noisy(problems.Ridge):
        def inner_batch(self, outer, step, *, generator):
            return super().inner_batch(outer, step, generator=generator) * (1 + torch.rand(()))

    case = problems.make("ridge", 0)
    noisy = Noisy(case.problem.inputs, case.problem.targets)
    hypergradient = bilevel.Hypergradient(noisy, bilevel.optim.sgd(0.1), 3, graph_budget=0)
    with pytest.raises(bilevel.ProblemError, match="not the same when it is run again"):
        hypergradient(case.outer, case.outer_batch)


@every_estimator
def test_a_variable_in_the_batch_that_the_loss_ignores_is_an_error(estimator):
    class Ignoring(problems.Ridge):
        def inner_batch(self, outer, step, *, generator):
            return dict(outer)

        def inner_loss(self, params, batch):
            return super().inner_loss(params, batch["log_penalty"].exp())

    case = problems.make("ridge", 0)
    problem = Ignoring(case.problem.inputs, case.problem.targets)
    outer = {**case.outer, "typo": torch.ones(2, dtype=torch.float64)}
    hypergradient = bilevel.Hypergradient(problem, bilevel.optim.sgd(0.1), 3, None, estimator)
    with pytest.raises(bilevel.UnusedOuterVariableError, match="typo"):
        hypergradient(outer, case.outer_batch)


@every_estimator
def test_a_closure_over_the_users_own_outer_tensor_is_an_error(estimator):
    case = problems.make("ridge", 0)
    outer = {"log_penalty": case.outer["log_penalty"].clone().requires_grad_()}

    class Closure(problems.Ridge):
        def inner_loss(self, params, batch):
            return super().inner_loss(params, batch) + outer["log_penalty"] * (params**2).sum()

    problem = Closure(case.problem.inputs, case.problem.targets)
    hypergradient = bilevel.Hypergradient(problem, bilevel.optim.sgd(0.1), 3, None, estimator)
    with pytest.raises(bilevel.ProblemError, match="other than through"):
        hypergradient.backward(outer, case.outer_batch)


def test_forward_takes_outer_tensors_of_any_layout():
    case = problems.make("mlp_distillation", 0)
    turned = {name: leaf.t().contiguous().t() for name, leaf in case.outer.items()}
    assert not turned["images"].is_contiguous()
    hypergradient = bilevel.Hypergradient(
        case.problem, bilevel.optim.sgd(0.1), 3, None, bilevel.estimators.Forward()
    )
    expected = hypergradient(case.outer, case.outer_batch, seeded(0)).grads
    actual = hypergradient(turned, case.outer_batch, seeded(0)).grads
    assert problems.relative_error(actual, expected) < 1e-12


def test_a_layer_is_initialised_after_its_parts():
    """MultiheadAttention sets the bias of its output projection to zero."""
    parameters = bilevel.fresh_parameters(nn.MultiheadAttention(8, 2), seeded(0))
    assert not parameters["out_proj.bias"].any()
    assert parameters["in_proj_weight"].any()


@pytest.mark.parametrize("estimator", [bilevel.estimators.Reverse(), bilevel.estimators.Adjoint()])
def test_a_loss_that_can_be_differentiated_only_once_is_refused(estimator):
    """PyTorch itself says nothing: its second derivative would come out as zero."""
    case = problems.make("quadratic", 0)
    case.problem.inner_loss = lambda params, batch: problems.OnceDifferentiable.apply(
        params["theta"] - batch
    ).sum()
    hypergradient = bilevel.Hypergradient(case.problem, bilevel.optim.sgd(0.1), 3, None, estimator)
    with pytest.raises(bilevel.ProblemError, match="OnceDifferentiable, whose backward is marked"):
        hypergradient(case.outer, case.outer_batch, seeded(0))
