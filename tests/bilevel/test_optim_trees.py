"""Hyperparameters for each part of the parameters, the vector form, and groups of parameters."""

import copy
import pickle
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import optree
import pytest
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import ONE_OF_EACH
from problems import flat, randn, relative_error, seeded

import bilevel
from bilevel import optim

seeds = st.integers(0, 2**31)
every_one = pytest.mark.parametrize("name", ONE_OF_EACH)
DTYPE = torch.float64


class Pair(NamedTuple):
    one: torch.Tensor
    other: torch.Tensor


def tree(generator):
    """Sorted keys, unsorted ones, and containers of every kind."""
    draw = lambda *shape: randn(*shape, generator=generator)  # noqa: E731
    return {
        "weight": draw(3, 2),
        "bias": draw(3),
        "later": OrderedDict(z=[draw(), draw(2, 1)], a=Pair(draw(4), draw(1, 2))),
    }


def follow(transformation, params, grads):
    """Every update of a run, as one vector."""
    state, found = transformation.init(params), []
    for grad in grads:
        updates, state = transformation.update(grad, state, params=params, inplace=False)
        params = optree.tree_map(torch.add, params, updates)
        found.append(updates)
    return flat(found)


def vectors_of(transformation, params, grads):
    vector = optim.on_vector(transformation, params)
    return follow(vector, flat(params), [flat(grad) for grad in grads])


@every_one
@given(seeds)
@settings(max_examples=5)
def test_the_vector_form_does_the_same(name, seed):
    generator = seeded(seed)
    params, grads = tree(generator), [tree(generator) for _ in range(3)]
    transformation = ONE_OF_EACH[name]
    if name == "groups":
        assert optim.on_vector(transformation, params) is None
    else:
        found = vectors_of(transformation, params, grads)
        assert (found - follow(transformation, params, grads)).norm() <= 1e-12 * found.norm()


def test_a_foreign_one_has_no_vector_form():
    params = torch.ones(3)
    assert optim.on_vector(torchopt.sgd(0.1), params) is None
    assert optim.on_vector(optim.chain(torchopt.sgd(0.1)), params) is None
    own = torchopt.base.GradientTransformation(lambda p: (), lambda u, s, **_: (u, s))
    assert optim.on_vector(own, params) is None


def spread(kind, params, generator, low, high):
    """A hyperparameter of some kind, and its value for every single parameter."""
    draw = lambda *shape: low + (high - low) * torch.rand(shape, dtype=DTYPE, generator=generator)  # noqa: E731
    full = optree.tree_map(lambda leaf: draw(*leaf.shape), params)
    if kind == "number":
        value = float(draw())
        return value, optree.tree_map(lambda leaf: torch.full_like(leaf, value), params)
    if kind == "scalar":
        value = draw()
        return value, optree.tree_map(lambda leaf: value.expand(leaf.shape), params)
    if kind == "numbers":
        value = optree.tree_map(lambda leaf: float(draw()), params)
        return value, optree.tree_map(lambda leaf, v: torch.full_like(leaf, v), params, value)
    if kind == "leaves":
        return full, full
    if kind == "broadcast":
        value = optree.tree_map(
            lambda leaf: draw(*(1 for _ in leaf.shape[:-1]), *leaf.shape[-1:]), params
        )
        return value, optree.tree_map(lambda leaf, v: v.expand(leaf.shape), params, value)
    prefix = {"later": draw(), "bias": float(draw()), "weight": draw(2)}
    later = optree.tree_map(lambda leaf: prefix["later"].expand(leaf.shape), params["later"])
    return prefix, {
        "weight": prefix["weight"].expand(3, 2),
        "bias": torch.full((3,), prefix["bias"], dtype=DTYPE),
        "later": later,
    }


KINDS = ["number", "scalar", "numbers", "leaves", "broadcast", "prefix"]
HYPERPARAMETERS = {
    optim.sgd: {"lr": (0.01, 1), "momentum": (0.1, 0.9), "weight_decay": (0.01, 1)},
    optim.adam: {
        "lr": (0.01, 1), "beta1": (0.1, 0.9), "beta2": (0.1, 0.9), "eps": (1e-3, 1e-1),
        "eps_root": (1e-3, 1e-1), "weight_decay": (0.01, 1),
    },
    optim.adamw: {
        "lr": (0.01, 1), "beta1": (0.1, 0.9), "beta2": (0.1, 0.9), "eps": (1e-3, 1e-1),
        "eps_root": (1e-3, 1e-1), "weight_decay": (0.01, 1),
    },
    optim.rmsprop: {
        "lr": (0.01, 1), "alpha": (0.1, 0.9), "eps": (1e-3, 1e-1), "eps_root": (1e-3, 1e-1),
        "weight_decay": (0.01, 1), "momentum": (0.1, 0.9),
    },
    optim.adagrad: {
        "lr": (0.01, 1), "eps": (1e-3, 1e-1), "eps_root": (1e-3, 1e-1), "weight_decay": (0.01, 1),
        "initial_accumulator_value": (0.01, 1),
    },
    optim.clip_by_value: {"bound": (0.1, 1)},
}  # fmt: skip


def made(make, values):
    values = dict(values)
    if "beta1" in values:
        values["betas"] = values.pop("beta1"), values.pop("beta2")
    return make(**values)


@pytest.mark.parametrize("make", HYPERPARAMETERS, ids=lambda make: make.__name__)
@given(st.data(), seeds)
@settings(max_examples=10)
def test_each_parameter_gets_its_own_hyperparameters(make, data, seed):
    """Against the same optimizer run on every single parameter alone; and their derivatives."""
    generator = seeded(seed)
    params, grads = tree(generator), [tree(generator) for _ in range(3)]
    kinds = {name: data.draw(st.sampled_from(KINDS)) for name in HYPERPARAMETERS[make]}
    given_, every = {}, {}
    for name, bounds in HYPERPARAMETERS[make].items():
        given_[name], every[name] = spread(kinds[name], params, generator, *bounds)
    entries = {name: flat(value) for name, value in every.items()}
    alone = torch.stack(
        [
            follow(
                made(make, {name: float(value[i]) for name, value in entries.items()}),
                flat(params)[i],
                [flat(grad)[i] for grad in grads],
            )
            for i in range(len(flat(params)))
        ],
        dim=1,
    )

    learned = optree.tree_map(
        lambda x: x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x, given_
    )
    leaves = [x for x in optree.tree_leaves(learned) if isinstance(x, torch.Tensor)]
    transformation = made(make, learned)
    on_tree = follow(transformation, params, grads)
    assert relative_error(on_tree.detach(), alone.flatten()) < 1e-12
    on_vector = vectors_of(transformation, params, grads)
    assert relative_error(on_vector.detach(), alone.flatten()) < 1e-12
    if leaves:
        weights = randn(len(on_tree), generator=generator)
        found = [
            torch.autograd.grad(weights @ value, leaves, retain_graph=True, materialize_grads=True)
            for value in (on_tree, on_vector)
        ]
        assert relative_error(found[0], found[1]) < 1e-10


@given(seeds)
def test_one_vector_is_an_entry_for_each_parameter(seed):
    generator = seeded(seed)
    params = {"a": randn(2, generator=generator), "b": (randn(2, 2, generator=generator),)}
    rates = torch.rand(6, dtype=DTYPE, generator=generator)
    grads = [optree.tree_map(torch.ones_like, params)]
    expected = -rates
    assert torch.equal(follow(optim.sgd(rates), params, grads), expected)
    assert torch.equal(vectors_of(optim.sgd(rates), params, grads), expected)


def test_one_vector_is_refused_where_its_order_is_a_guess():
    params = {"outer": {"weight": torch.ones(2, 2), "bias": torch.ones(2)}}
    for attempt in (
        lambda: optim.on_vector(optim.sgd(torch.ones(6)), params),
        lambda: follow(optim.sgd(torch.ones(6)), params, [params]),
    ):
        with pytest.raises(
            bilevel.ConfigurationError, match=r"lr is one vector.*'weight', 'bias'.*pytree"
        ):
            attempt()
    ordered = {"outer": OrderedDict(params["outer"])}
    found = follow(optim.sgd(torch.arange(6.0)), ordered, [ordered])
    assert torch.equal(found, -torch.arange(6.0))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"weight": 0.1}, r"lr has 'weight', where the parameters have 'bias', 'weight'"),
        ({"weight": 0.1, "bias": 0.1, "more": 1.0}, r"lr has .*'more'"),
        ({"weight": {"x": 0.1}, "bias": 0.1}, r"lr is a dict at 'weight'.*shape \(2, 2\)"),
        ([0.1, 0.2], r"lr has 0, 1, where"),
        (torch.ones(8), r"lr has shape \(8,\) for the parameters at 'bias', of shape \(3,\)"),
        ({"weight": torch.ones(3), "bias": 0.1}, r"lr has shape \(3,\).*'weight'.* shape \(2, 2\)"),
        ({"weight": 0.1, "bias": torch.ones(1, 3)}, r"lr has shape \(1, 3\).*shape \(3,\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_both_shapes(value, message):
    params = {"weight": torch.ones(2, 2), "bias": torch.ones(3)}
    for attempt in (
        lambda: optim.on_vector(optim.sgd(value), params),
        lambda: follow(optim.chain(optim.sgd(value)), params, [params]),
    ):
        with pytest.raises(bilevel.ConfigurationError, match=message):
            attempt()


@pytest.mark.parametrize("make", HYPERPARAMETERS, ids=lambda make: make.__name__)
def test_numbers_of_numpy_are_numbers(make):
    params = torch.ones(3, dtype=DTYPE)
    for name, (low, high) in HYPERPARAMETERS[make].items():
        plain = {"lr": 0.1} if name != "lr" and "lr" in HYPERPARAMETERS[make] else {}
        if name in ("beta1", "beta2"):
            continue
        value = np.float32((low + high) / 2)
        ours = follow(make(**plain, **{name: value}), params, [params, params])
        assert torch.equal(
            ours, follow(make(**plain, **{name: float(value)}), params, [params] * 2)
        )
        for bad in ("0.1", None, True, np.bool_(True), np.ones(2), -1, np.float64(-1)):
            with pytest.raises(bilevel.ConfigurationError, match=rf"{name}="):
                make(**plain, **{name: bad})
            with pytest.raises(bilevel.ConfigurationError, match=rf"{name}="):
                make(**plain, **{name: {"a": 0.1, "b": [bad]}})


@every_one
def test_it_pickles_and_copies(name):
    generator = seeded(0)
    params, grads = tree(generator), [tree(generator) for _ in range(2)]
    expected = follow(ONE_OF_EACH[name], params, grads)
    for again in (copy.deepcopy(ONE_OF_EACH[name]), pickle.loads(pickle.dumps(ONE_OF_EACH[name]))):
        assert torch.equal(follow(again, params, grads), expected)
        assert (optim.on_vector(again, params) is None) == (name == "groups")


def test_pytrees_of_rates_pickle():
    optimizer = optim.adam({"a": torch.tensor(0.1), "b": 0.2})
    params = {"a": torch.ones(2), "b": torch.ones(1)}
    again = pickle.loads(pickle.dumps(optimizer))
    assert torch.equal(follow(again, params, [params]), follow(optimizer, params, [params]))


# Groups.


@given(seeds)
@settings(max_examples=10)
def test_every_group_is_its_own_run(seed):
    generator = seeded(seed)
    params, grads = tree(generator), [tree(generator) for _ in range(3)]
    matrices = lambda name, leaf: leaf.dim() > 1  # noqa: E731
    grouped = optim.groups(
        {
            "later/a": optim.chain(optim.clip_by_norm(0.5), optim.sgd(0.1)),
            matrices: optim.adamw(0.1),
            "bia*": None,
            "*": optim.sgd(0.3, momentum=0.9),
        }
    )
    state, now = grouped.init(params), params
    for grad in grads:
        updates, state = grouped.update(grad, state, params=now, inplace=False)
        now = optree.tree_map(torch.add, now, updates)

    def alone(optimizer, pick):
        state, theta = optimizer.init(pick(params)), pick(params)
        for grad in grads:
            updates, state = optimizer.update(pick(grad), state, params=theta, inplace=False)
            theta = optree.tree_map(torch.add, theta, updates)
        return theta

    clipped = optim.chain(optim.clip_by_norm(0.5), optim.sgd(0.1))
    assert relative_error(now["later"]["a"], alone(clipped, lambda t: t["later"]["a"])) < 1e-13
    pick = lambda t: [t["weight"], t["later"]["z"][1]]  # noqa: E731
    assert relative_error(pick(now), alone(optim.adamw(0.1), pick)) < 1e-13
    assert torch.equal(now["bias"], params["bias"])
    pick = lambda t: t["later"]["z"][0]  # noqa: E731
    assert relative_error(pick(now), alone(optim.sgd(0.3, momentum=0.9), pick)) < 1e-13


def test_names_of_a_module_are_cut_at_their_dots():
    params = {"layers.1.weight": torch.ones(2), "layers.10.weight": torch.ones(2)}
    optimizer = optim.groups({"layers.1": optim.sgd(1.0), "layers.10": optim.sgd(2.0)})
    assert torch.equal(follow(optimizer, params, [params]), torch.tensor([-1.0, -1, -2, -2]))


def test_rates_by_group_are_like_the_whole_tree_and_torchopt_may_be_a_part():
    params = {"a": torch.ones(2), "b": {"c": torch.ones(1), "d": torch.ones(1)}}
    optimizer = optim.groups(
        {"b": optim.sgd({"a": 9.0, "b": {"c": 1.0, "d": 2.0}}), "a": torchopt.adam(0.1)}
    )
    found = follow(optimizer, params, [params])
    torch.testing.assert_close(found, torch.tensor([-0.1, -0.1, -1.0, -2.0]))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"weight": optim.sgd(0.1)}, "no part for 'bias'"),
        ({"*": optim.sgd(0.1), "head": None}, "pattern 'head', which no leaf"),
        ({"*": optim.sgd(0.1), "bias": None}, "pattern 'bias', which no leaf fits first"),
        ({"*": optim.sgd(0.1), lambda name, leaf: False: None}, "pattern <lambda>"),
    ],
)
def test_a_leaf_without_a_group_and_a_group_without_a_leaf_are_named(parts, message):
    params = {"weight": torch.ones(2), "bias": torch.ones(2), "later": {"weight": torch.ones(1)}}
    if "*" not in parts:
        parts = {**parts, "later": None}
    with pytest.raises(bilevel.ConfigurationError, match=message):
        optim.groups(parts).init(params)


@pytest.mark.parametrize("parts", [{}, None, {"a": 0.1}, {3: None}, {"a": torch.optim.SGD}])
def test_parts_that_cannot_work(parts):
    with pytest.raises(bilevel.ConfigurationError, match="groups"):
        optim.groups(parts)


def test_a_chain_needs_transformations():
    with pytest.raises(bilevel.ConfigurationError, match=r"chain\(\) is empty"):
        optim.chain()
    with pytest.raises(bilevel.ConfigurationError, match="argument 1 of chain is a float"):
        optim.chain(optim.sgd(0.1), 0.5)
