"""Our optimizers: PyTorch's steps, pure, differentiable in everything, and TorchOpt's protocol."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import optree
import problems
import pytest
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import flat, randn, relative_error, seeded
from torch.func import jvp, vjp, vmap

import bilevel
from bilevel import optim

unit = st.floats(0.05, 0.95)
decay = st.sampled_from([0.0, 0.01, 0.3])
seeds = st.integers(0, 2**31)


@dataclass
class Kind:
    """An optimizer, its namesake, and its hyperparameters: strategies for numbers and flags."""

    ours: Any
    theirs: Any
    numbers: dict[str, Any]
    flags: dict[str, Any]

    def hyperparameters(self):
        return st.fixed_dictionaries({"lr": st.floats(1e-3, 1.0)} | self.numbers | self.flags)


adaptive = {"eps": st.floats(1e-8, 1e-2), "weight_decay": decay}
KINDS = {
    "sgd": Kind(optim.sgd, torch.optim.SGD, {"weight_decay": decay}, {}),
    "momentum": Kind(
        optim.sgd,
        torch.optim.SGD,
        {"momentum": unit, "weight_decay": decay},
        {"nesterov": st.booleans()},
    ),
    "adam": Kind(optim.adam, torch.optim.Adam, adaptive, {"betas": st.tuples(unit, unit)}),
    "adamw": Kind(optim.adamw, torch.optim.AdamW, adaptive, {"betas": st.tuples(unit, unit)}),
    "rmsprop": Kind(
        optim.rmsprop,
        torch.optim.RMSprop,
        adaptive | {"alpha": unit, "momentum": st.sampled_from([0.0, 0.5])},
        {"centered": st.booleans()},
    ),
    "adagrad": Kind(
        optim.adagrad,
        torch.optim.Adagrad,
        adaptive,
        {"initial_accumulator_value": st.sampled_from([0.0, 0.1])},
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
DEFAULTS = {
    "sgd": optim.sgd(0.1),
    "nesterov": optim.sgd(0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": optim.adam(0.1),
    "adamw": optim.adamw(0.1),
    "rmsprop": optim.rmsprop(0.1, momentum=0.9, centered=True),
    "adagrad": optim.adagrad(0.1, weight_decay=0.1),
}
every_default = pytest.mark.parametrize("optimizer", DEFAULTS.values(), ids=DEFAULTS)


def tree(generator):
    return {"a": randn(3, 2, generator=generator), "b": [randn(generator=generator)]}


def run(transformation, params, grads):
    """Parameters after one step for each of `grads`."""
    state = transformation.init(params)
    for grad in grads:
        updates, state = transformation.update(grad, state, params=params, inplace=False)
        params = optree.tree_map(torch.add, params, updates)
    return params


@every_kind
@given(st.data(), st.integers(1, 12), seeds)
def test_it_takes_the_steps_of_torch(kind, data, steps, seed):
    hyperparameters = data.draw(kind.hyperparameters())
    generator = seeded(seed)
    params = tree(generator)
    grads = [tree(generator) for _ in range(steps)]
    theirs = optree.tree_map(lambda leaf: leaf.clone().requires_grad_(), params)
    reference = kind.theirs(optree.tree_leaves(theirs), **hyperparameters)
    for grad in grads:
        for leaf, slope in zip(optree.tree_leaves(theirs), optree.tree_leaves(grad), strict=True):
            leaf.grad = slope.clone()
        reference.step()

    root = {} if kind.theirs is torch.optim.SGD else {"eps_root": 0.0}
    transformation = kind.ours(**hyperparameters, **root)
    ours = run(transformation, params, grads)
    vector = run(transformation, flat(params), [flat(grad) for grad in grads])
    expected = flat(theirs).detach()
    assert flat(ours).dtype == torch.float64
    assert relative_error(ours, expected) < 1e-12
    assert torch.equal(flat(ours), vector)


@every_kind
@given(st.data(), seeds)
def test_every_hyperparameter_is_differentiable(kind, data, seed):
    """Against central differences, each hyperparameter given as a tensor."""
    numbers = {"lr": st.floats(0.05, 0.5)} | kind.numbers
    values = {name: data.draw(strategy) for name, strategy in numbers.items()}
    values |= {name: data.draw(unit) for name in ("weight_decay", "eps") if name in values}
    values |= {"momentum": data.draw(unit)} if "momentum" in values else {}
    flags = {n: data.draw(s) for n, s in kind.flags.items() if n != "betas"}
    if "betas" in kind.flags:
        values |= {"beta1": data.draw(unit), "beta2": data.draw(unit)}
    if kind.theirs is not torch.optim.SGD:
        values["eps_root"] = data.draw(st.floats(0.01, 0.1))
    generator = seeded(seed)
    params, weights = randn(4, generator=generator), randn(4, generator=generator)
    grads = [randn(4, generator=generator) for _ in range(3)]

    def objective(values):
        values = dict(values)
        if "beta1" in values:
            values["betas"] = values.pop("beta1"), values.pop("beta2")
        return weights @ run(kind.ours(**values, **flags), params, grads)

    tensors = {n: torch.tensor(v, dtype=torch.float64) for n, v in values.items()}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    objective(leaves).backward()
    for name, tensor in tensors.items():
        up, down = (objective(tensors | {name: tensor + h}) for h in (1e-5, -1e-5))
        difference = float(up - down) / 2e-5
        scale = 1e-3 + abs(difference)
        assert abs(float(leaves[name].grad) - difference) < 1e-5 * scale, name


@every_default
def test_update_never_writes_to_what_it_is_given(optimizer):
    generator = seeded(0)
    params, grads = tree(generator), tree(generator)
    state = optimizer.init(params)
    _, state = optimizer.update(grads, state, params=params)
    given_ = (params, grads, state)
    before = optree.tree_map(torch.clone, given_)
    for inplace in (False, True):
        updates, after = optimizer.update(grads, state, params=params, inplace=inplace)
        assert optree.tree_all(optree.tree_map(torch.equal, given_, before))
        addresses = {leaf.data_ptr() for leaf in optree.tree_leaves((params, grads))}
        assert not addresses & {leaf.data_ptr() for leaf in optree.tree_leaves((updates, after))}


@every_default
@given(seeds)
@settings(max_examples=5)
def test_vmap_is_a_loop_and_vjp_is_the_transpose_of_jvp(optimizer, seed):
    generator = seeded(seed)
    params, one, two, tangent, cotangent = randn(5, 3, 4, generator=generator)

    def after(params, one, two):
        return run(optimizer, params, [one, two])

    rows = torch.stack([after(*row) for row in zip(params, one, two, strict=True)])
    assert relative_error(vmap(after)(params, one, two), rows) < 1e-12

    _, forward = jvp(lambda grad: after(params, grad, two), (one,), (tangent,))
    _, pull = vjp(lambda grad: after(params, grad, two), one)
    left, right = (forward * cotangent).sum(), (tangent * pull(cotangent)[0]).sum()
    assert abs(left - right) < 1e-10 * forward.norm() * cotangent.norm()


@every_default
@given(seeds)
@settings(max_examples=5)
def test_it_chains_with_torchopt(optimizer, seed):
    generator = seeded(seed)
    params, grads = tree(generator), [tree(generator) for _ in range(3)]
    chained = torchopt.chain(torchopt.clip.clip_grad_norm(0.5), optimizer)
    clipped = []
    for grad in grads:
        scale = (0.5 / (flat(grad).norm() + 1e-6)).clamp(max=1.0)
        clipped.append(optree.tree_map(partial(torch.mul, scale), grad))
    assert relative_error(run(chained, params, grads), run(optimizer, params, clipped)) < 1e-12


def slope_at_zero_gradient(optimizer):
    grad = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    params = torch.ones(2, dtype=torch.float64)
    run(optimizer, params, [grad, grad]).sum().backward()
    return grad.grad[0]


@pytest.mark.parametrize("make", [optim.adam, optim.adamw, optim.rmsprop, optim.adagrad])
def test_eps_root_makes_the_derivative_at_a_zero_gradient_finite(make):
    assert torch.isfinite(slope_at_zero_gradient(make(0.1)))
    assert not torch.isfinite(slope_at_zero_gradient(make(0.1, eps_root=0.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_default
def test_the_dtype_is_kept(optimizer, dtype):
    params = torch.ones(3, dtype=dtype)
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(params, state, params=params)
        floating = [leaf for leaf in optree.tree_leaves(state) if leaf.is_floating_point()]
        assert {leaf.dtype for leaf in [updates, *floating]} == {dtype}


@pytest.mark.parametrize("make", [optim.adam, optim.adamw])
def test_bias_correction_is_exact_in_float64(make):
    """With a constant gradient m̂ = g and v̂ = g², so every step is −lr·g/(|g| + eps)."""
    grad = torch.tensor([0.3, -2.0], dtype=torch.float64)
    params = torch.zeros(2, dtype=torch.float64)
    transformation = make(0.1, betas=(0.9, 0.999), eps=0.0, eps_root=0.0, weight_decay=0.0)
    state = transformation.init(params)
    for _ in range(5):
        updates, state = transformation.update(grad, state, params=params)
        assert float((updates + 0.1 * grad.sign()).abs().max()) < 1e-13


@pytest.mark.parametrize(
    ("make", "name", "values"),
    [
        (make, name, [-0.5, float("nan")])
        for make in (optim.adam, optim.adamw, optim.rmsprop, optim.adagrad)
        for name in ("lr", "eps", "eps_root", "weight_decay")
    ]
    + [
        (optim.sgd, "lr", [-1, float("nan")]),
        (optim.sgd, "weight_decay", [-1.0]),
        (optim.sgd, "momentum", [-0.1, 1.0, 2]),
        (optim.rmsprop, "momentum", [-0.1, 1.0]),
        (optim.rmsprop, "alpha", [-0.1, 1.0]),
        (optim.adagrad, "initial_accumulator_value", [-0.1]),
    ],
)
def test_a_bad_hyperparameter_is_named_with_its_value(make, name, values):
    for value in values:
        with pytest.raises(bilevel.ConfigurationError, match=f"{name}={value}: it must be"):
            make(**{"lr": 0.1, name: value})


@pytest.mark.parametrize("make", [optim.adam, optim.adamw])
def test_bad_betas_are_named(make):
    with pytest.raises(bilevel.ConfigurationError, match=r"beta1=1.0: it must be .*\[0, 1\)"):
        make(betas=(1.0, 0.9))
    with pytest.raises(bilevel.ConfigurationError, match=r"beta2=-1: it must be .*\[0, 1\)"):
        make(betas=(0.9, -1))


def test_nesterov_needs_momentum_and_decay_needs_params():
    with pytest.raises(bilevel.ConfigurationError, match="nesterov=True"):
        optim.sgd(0.1, nesterov=True)
    for transformation in (optim.sgd(0.1, weight_decay=0.1), optim.adamw(0.1)):
        state = transformation.init(torch.ones(2))
        with pytest.raises(bilevel.ConfigurationError, match="params=params"):
            transformation.update(torch.ones(2), state)


# TorchOpt's momentum knows its first call by a flag outside its state.


def inner_params(optimizer, case, steps):
    """θ_steps by the package, after a first run that may have left something behind."""
    hypergradient = bilevel.Hypergradient(case.problem, optimizer, steps)
    for _ in range(2):
        result = hypergradient(case.outer, case.outer_batch, seeded(0))
    return flat(result.params)


def torch_params(case, steps, lr, **hyperparameters):
    """θ_steps by `torch.optim.SGD`."""
    key = bilevel.Key.draw(seeded(0))
    params = case.problem.init(case.outer, generator=key.generator("init"))
    params = optree.tree_map(lambda leaf: leaf.clone().requires_grad_(), params)
    optimizer = torch.optim.SGD(optree.tree_leaves(params), lr=lr, **hyperparameters)
    for step in range(steps):
        optimizer.zero_grad()
        batch = case.problem.inner_batch(case.outer, step, generator=seeded(0))
        case.problem.inner_loss(params, batch).backward()
        optimizer.step()
    return flat(params).detach()


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "weight_decay": 0.1},
    ],
    ids=lambda hyperparameters: "-".join(hyperparameters),
)
def test_torchopt_momentum_steps_as_torch_whenever_it_was_made(hyperparameters):
    """Made once before the run, and made anew for every step from a learned rate."""
    once = problems.make("quadratic", 0)
    expected = torch_params(once, 4, 0.1, **hyperparameters)
    actual = inner_params(torchopt.sgd(0.1, **hyperparameters), once, 4)
    assert relative_error(actual, expected) < 1e-12

    anew = problems.make("learned_rate", 0)
    rate = float(anew.outer["log_lr"].exp())
    expected = torch_params(anew, 4, rate, **hyperparameters)
    actual = inner_params(lambda lr: torchopt.sgd(lr, **hyperparameters), anew, 4)
    assert relative_error(actual, expected) < 1e-12


def test_torchopt_momentum_with_a_different_first_step_is_refused():
    """Its first-call flag lies outside its state, so the first step could not be run again."""
    dampened = torchopt.sgd(0.1, momentum=0.9, dampening=0.5)
    with pytest.raises(bilevel.ConfigurationError, match="dampening=0"):
        bilevel.InnerLoop(problems.make("quadratic", 0).problem, dampened)
