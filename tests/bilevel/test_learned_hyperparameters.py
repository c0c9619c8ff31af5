"""Hyperparameters of every kind, learned through every exact estimator, against brute force."""

from functools import partial

import optree
import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPE, brute_force, relative_error, seeded

import bilevel
from bilevel import optim
from bilevel.estimators import Adjoint, Forward, Reverse

seeds = st.integers(0, 2**31)


class Learned(bilevel.Problem):
    """A small regression on nested parameters; φ is what `hyperparameters` is made from."""

    def __init__(self, values, seed):
        generator = seeded(seed)
        self.values = values
        self.inputs = problems.randn(8, 3, generator=generator)
        self.targets = problems.randn(8, generator=generator)

    def init(self, outer, *, generator):
        draw = partial(problems.randn, generator=generator)
        return {"weight": draw(3, 2), "bias": draw(2), "head": [draw(2), draw()]}

    def inner_batch(self, outer, step, *, generator):
        return torch.randperm(8, generator=generator)[:5]

    def inner_loss(self, params, batch):
        hidden = torch.tanh(self.inputs[batch] @ params["weight"] + params["bias"])
        return ((hidden @ params["head"][0] + params["head"][1] - self.targets[batch]) ** 2).mean()

    def outer_loss(self, params, outer, batch):
        return self.inner_loss(params, torch.arange(8))

    def hyperparameters(self, outer, step):
        return {name: value(outer[name], step) for name, value in self.values.items()}


def numbers(shape, generator):
    return 0.02 + 0.2 * torch.rand(shape, dtype=DTYPE, generator=generator)


def full(generator):
    return {
        "weight": numbers((3, 2), generator),
        "bias": numbers((2,), generator),
        "head": [numbers((2,), generator), numbers((), generator)],
    }


#: Outer variables, and what is made of them at a step.
KINDS = {
    "scalar": (lambda g: numbers((), g), lambda x, step: x),
    "one a leaf": (
        lambda g: {"weight": numbers((), g), "bias": numbers((), g), "head": numbers((2,), g)},
        lambda x, step: {**x, "head": list(x["head"])},
    ),
    "prefix": (
        lambda g: {"weight": numbers((2,), g), "bias": numbers((1,), g), "head": numbers((), g)},
        lambda x, step: x,
    ),
    "one a parameter": (full, lambda x, step: x),
    "a schedule": (lambda g: numbers((6,), g), lambda x, step: x[step]),
    "a schedule of trees": (full, lambda x, step: optree.tree_map(lambda r: r * 0.9**step, x)),
}
kinds = st.sampled_from(sorted(KINDS))


def make_groups(weight, rest):
    return optim.groups(
        {
            "weight": optim.sgd(weight, momentum=0.5),
            "bias": None,
            "*": optim.adam(rest, eps_root=1e-6),
        }
    )


def clipped(bound, lr):
    return optim.chain(optim.clip_by_norm(bound), optim.sgd(lr, momentum=0.3))


MAKERS = {
    "sgd": (optim.sgd, ("lr", "momentum", "weight_decay")),
    "adam": (partial(optim.adam, eps_root=1e-6), ("lr", "weight_decay")),
    "adam's betas": (lambda one, two: optim.adam(0.1, (one, two), eps_root=1e-6), ("one", "two")),
    "adamw": (partial(optim.adamw, eps_root=1e-6), ("lr", "eps", "weight_decay")),
    "rmsprop": (partial(optim.rmsprop, eps_root=1e-6, centered=True), ("lr", "alpha", "momentum")),
    "adagrad": (
        partial(optim.adagrad, eps_root=1e-6),
        ("lr", "eps", "initial_accumulator_value"),
    ),
    "by value": (
        lambda bound, lr: optim.chain(optim.clip_by_value(bound), optim.sgd(lr)),
        ("bound", "lr"),
    ),
}


def check(make, values, seed, window, estimators):
    generator = seeded(seed)
    outer = {name: KINDS[kind][0](generator) for name, kind in values.items()}
    problem = Learned({name: KINDS[kind][1] for name, kind in values.items()}, seed)
    case = problems.Case(problem, outer, None)
    loss, grads = brute_force(case, make, bilevel.Key.draw(seeded(seed)), window)
    schedule = problems.Fixed(window.start, window.stop)
    for estimator in estimators:
        made = bilevel.Hypergradient(problem, make, window.stop, schedule, estimator)
        found = made(outer, None, seeded(seed))
        assert relative_error(found.loss, loss) < 1e-10
        assert relative_error(found.grads, grads) < 1e-8


@pytest.mark.parametrize("name", MAKERS)
@given(st.data(), seeds, st.integers(0, 3))
@settings(max_examples=5)
def test_of_every_optimizer(name, data, seed, start):
    make, names = MAKERS[name]
    values = {each: data.draw(kinds) for each in names}
    check(make, values, seed, bilevel.Window(start, 5), [Adjoint(), Reverse()])


@given(st.data(), seeds, st.sampled_from(["sgd", "adam", "rmsprop"]))
@settings(max_examples=6)
def test_in_forward_mode(data, seed, name):
    make, names = MAKERS[name]
    values = {each: data.draw(st.sampled_from(["scalar", "one a leaf"])) for each in names}
    check(make, values, seed, bilevel.Window(0, 4), [Forward(), Adjoint("forward")])


@given(seeds, st.sampled_from(["scalar", "a schedule"]), st.integers(0, 3))
@settings(max_examples=5)
def test_of_groups_and_of_a_norm(seed, kind, start):
    window = bilevel.Window(start, 5)
    check(make_groups, {"weight": kind, "rest": kind}, seed, window, [Adjoint(), Reverse()])
    check(clipped, {"bound": kind, "lr": kind}, seed, window, [Adjoint(), Reverse()])
