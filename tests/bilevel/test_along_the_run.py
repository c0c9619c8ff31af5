"""Losses along the run, hyperparameters of every step, and a call that autograd goes on from."""

from functools import partial

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import PATHS, TEST_INPUTS, TEST_TARGETS, Weighted, follow, reference
from problems import DTYPE, flat, randn, relative_error, seeded
from torch import nn
from torchopt.base import GradientTransformation

import bilevel

EXACT = 1e-8
seeds = st.integers(0, 2**31)


@st.composite
def windows(draw):
    """(steps, start, stop) with 0 ≤ start < stop ≤ steps ≤ 5."""
    steps = draw(st.integers(1, 5))
    stop = draw(st.integers(1, steps))
    return steps, draw(st.integers(0, stop - 1)), stop


class AlongTheRun(Weighted):
    """A learned start, rates of every step, and losses at some steps of the run and at its end."""

    def __init__(self, rates, every):
        super().__init__()
        self.rates, self.every = rates, every

    def rows(self, step):
        return torch.arange(2 * step, 2 * step + 3) % 6

    def init(self, outer, *, generator):
        theta = outer["start"] + 0.3 * randn(4, 2, generator=generator)
        return {"theta": theta, "bias": [torch.ones(2, dtype=DTYPE), outer["start"][0]]}

    def predict(self, params, inputs):
        hidden = torch.tanh(inputs @ params["theta"] + params["bias"][0])
        return hidden @ params["bias"][1]

    def hyperparameters(self, outer, step):
        return self.rates(0.05 * outer["rates"][step].exp(), outer)

    def step_loss(self, params, outer, step, *, generator):
        if step % self.every:
            return None
        rows = torch.randint(len(TEST_TARGETS), (3,), generator=generator)
        error = self.predict(params, TEST_INPUTS[rows]) - TEST_TARGETS[rows]
        return (error**2).mean() + 0.01 * (step + 1) * (outer["rates"] ** 2).sum()


class OnlyAlongTheRun(AlongTheRun):
    outer_loss = bilevel.Problem.outer_loss


def variables(seed):
    generator = seeded(seed)
    return {
        "weights": randn(6, generator=generator),
        "rates": randn(5, 2, generator=generator),
        "start": 0.5 * randn(4, 2, generator=generator),
    }


#: By name: a scalar, the upper part of the parameters' tree, and a tree like it.
RATES = {
    "scalar": lambda rate, outer: {"lr": rate[0]},
    "prefix": lambda rate, outer: {"lr": {"theta": rate[0], "bias": rate[1]}},
    "tree": lambda rate, outer: {"lr": {"theta": rate * outer["start"], "bias": [rate, rate[1]]}},
}


def by_leaf(lr):
    """An optimizer of a user's, which sees the pytree: normalised by the norm of each leaf."""

    def update(updates, state, *, params=None, inplace=True):
        lrs = lr if isinstance(lr, dict) else {"theta": lr, "bias": [lr, lr]}
        if not isinstance(lrs["bias"], list):
            lrs = {"theta": lrs["theta"], "bias": [lrs["bias"]] * 2}
        moved = optree.tree_map(
            lambda g, p, r, s: -r * (g / (g.norm() + 0.1) + 0.1 * s + (p if p.dim() > 1 else 0)),
            updates,
            params,
            lrs,
            state,
        )
        return moved, optree.tree_map(lambda g, s: 0.5 * s + g, updates, state)

    return GradientTransformation(partial(optree.tree_map, torch.zeros_like), update)


OPTIMIZERS = {
    "sgd": bilevel.optim.sgd,
    "momentum": partial(bilevel.optim.sgd, momentum=0.9, nesterov=True),
    "adam": partial(bilevel.optim.adam, eps_root=1e-6),
    "adagrad": partial(bilevel.optim.adagrad, eps_root=1e-6),
    "by leaf": by_leaf,
}


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=6)
@given(
    windows(),
    st.sampled_from(list(RATES)),
    st.sampled_from(list(OPTIMIZERS)),
    st.sampled_from([AlongTheRun, OnlyAlongTheRun]),
    st.integers(1, 3),
    seeds,
)
def test_it_is_autograd_through_the_window(path, shape, rates, optimizer, kind, every, seed):
    steps, *window = shape
    problem, outer = kind(RATES[rates], every), variables(seed % 1000)
    make = OPTIMIZERS[optimizer]
    result = follow(path, problem, outer, window, make, steps, seed)
    loss, grads = reference(problem, outer, window, make, seed)
    assert abs(float(result.loss - loss)) <= EXACT * abs(float(loss)) + 1e-15
    for name in outer:
        error = float((result.grads[name] - grads[name]).norm())
        assert error <= EXACT * float(grads[name].norm()) + 1e-15, name


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=4)
@given(windows(), seeds, st.floats(-2, 2))
def test_autograd_goes_on_from_the_loss(path, shape, seed, factor):
    """Outer variables made by a network, two runs in one sum, and a regulariser."""
    steps, *window = shape
    problem = AlongTheRun(RATES["scalar"], 1)
    before = variables(seed % 1000)
    network = nn.Linear(3, flat(before).numel(), dtype=DTYPE)
    leaves, spec = optree.tree_flatten(before)

    def generated(code):
        pieces = network(code).split([leaf.numel() for leaf in leaves])
        return optree.tree_unflatten(
            spec, [x.view(leaf.shape) for x, leaf in zip(pieces, leaves, strict=True)]
        )

    codes = torch.eye(3, dtype=DTYPE)[:2]
    hypergradient = bilevel.Hypergradient(problem, bilevel.optim.sgd, steps, **PATHS[path](*window))
    total = factor * sum(hypergradient.loss(generated(x), None, seeded(seed)) for x in codes)
    (total + network.weight.square().sum()).backward()

    expected = 2 * network.weight.detach()
    for code in codes:
        outer = generated(code)
        _, grads = reference(
            problem, optree.tree_map(torch.Tensor.detach, outer), window, bilevel.optim.sgd, seed
        )
        (pulled,) = torch.autograd.grad(
            optree.tree_leaves(outer), network.weight, optree.tree_leaves(grads)
        )
        expected = expected + factor * pulled
    assert relative_error(network.weight.grad, expected) < EXACT


def test_the_loss_is_that_of_a_call_and_can_be_differentiated_once():
    problem, outer = AlongTheRun(RATES["scalar"], 1), variables(0)
    outer = optree.tree_map(lambda x: x.clone().requires_grad_(), outer)
    hypergradient = bilevel.Hypergradient(problem, bilevel.optim.sgd, 5)
    loss = hypergradient.loss(outer, None, seeded(0))
    result = hypergradient(outer, None, seeded(0))
    assert torch.equal(loss.detach(), result.loss)
    found = torch.autograd.grad(loss, list(outer.values()), retain_graph=True)
    assert all(torch.equal(g, result.grads[name]) for g, name in zip(found, outer, strict=True))
    with pytest.raises(bilevel.ProblemError, match="differentiated once"):
        torch.autograd.grad(loss, list(outer.values()), create_graph=True)


def test_the_loss_is_not_for_torch_func_nor_for_a_batch_with_derivatives():
    problem, outer = AlongTheRun(RATES["scalar"], 1), variables(0)
    hypergradient = bilevel.Hypergradient(problem, bilevel.optim.sgd, 2)
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(bilevel.ProblemError, match=r"transform of torch\.func"):
            transform(lambda x: hypergradient.loss({**outer, "start": x}))(torch.ones(4, 2))
    with pytest.raises(bilevel.ProblemError, match="outer_batch holds a tensor that requires"):
        hypergradient.loss(outer, {"x": torch.ones(2, requires_grad=True)})


def test_a_step_without_a_loss_counts_as_zero():
    outer = variables(0)
    problem = OnlyAlongTheRun(RATES["scalar"], 10)  # a loss at step 0 alone
    whole = follow("recorded graph", problem, outer, (0, 5), bilevel.optim.sgd)
    first = follow("recorded graph", problem, outer, (0, 1), bilevel.optim.sgd)
    assert torch.equal(whole.loss, first.loss)
    assert relative_error(whole.grads, first.grads) < 1e-12


@pytest.mark.parametrize(
    "value", [0.5, torch.ones(2, dtype=DTYPE), torch.ones((), dtype=torch.int64)]
)
def test_a_loss_along_the_run_that_is_no_scalar_is_an_error(value):
    problem = OnlyAlongTheRun(RATES["scalar"], 1)
    problem.step_loss = lambda params, outer, step, *, generator: value
    with pytest.raises(bilevel.ProblemError, match="step_loss returned"):
        follow("recorded graph", problem, variables(0), optimizer=bilevel.optim.sgd)


@pytest.mark.parametrize("value", [None, [torch.ones(())], {"lr": 0.1}, {"lr": []}])
def test_hyperparameters_that_are_no_dict_of_tensors_are_an_error(value):
    problem = AlongTheRun(lambda rate, outer: value, 1)
    with pytest.raises(bilevel.ProblemError, match="hyperparameters"):
        follow("recorded graph", problem, variables(0), optimizer=bilevel.optim.sgd)


@pytest.mark.parametrize(
    ("method", "function"),
    [
        ("init", lambda outer: None),
        ("inner_batch", lambda outer, *, generator: None),
        ("inner_loss", lambda params: None),
        ("outer_loss", lambda params, outer: None),
        ("step_loss", lambda params, outer, step: None),
        ("hyperparameters", lambda outer: {}),
    ],
)
def test_a_method_with_other_arguments_is_named_before_it_is_called(method, function):
    problem = AlongTheRun(RATES["scalar"], 1)
    setattr(problem, method, function)
    with pytest.raises(bilevel.ProblemError, match=f"{method} must take"):
        bilevel.Hypergradient(problem, bilevel.optim.sgd, 2)


@pytest.mark.parametrize("estimator", [bilevel.estimators.Implicit, bilevel.estimators.FixedPoint])
def test_an_estimator_that_sees_only_the_end_refuses_losses_along_the_run(estimator):
    with pytest.raises(bilevel.ConfigurationError, match="losses along it"):
        bilevel.Hypergradient(
            AlongTheRun(RATES["scalar"], 1), bilevel.optim.sgd, 2, None, estimator()
        )
