"""The exact estimators give the derivative that autograd, differences and algebra give."""

from functools import partial

import optree
import problems
import pytest
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Fixed, flat, seeded

import bilevel
from bilevel.estimators import Adjoint, Forward, Reverse

EXACT = 1e-8

rates = st.floats(0.01, 0.1)
decays = st.sampled_from([0.0, 0.01, 0.1])
momenta = st.floats(0.1, 0.95)
betas = st.tuples(st.floats(0.5, 0.95), st.floats(0.5, 0.999))
roots = st.sampled_from([1e-10, 1e-8, 1e-6])


def builds(function, **hyperparameters):
    """A strategy for functions of the learning rate alone."""
    return st.builds(partial, st.just(function), **hyperparameters)


def clip_then_adam(lr, **hyperparameters):
    """A chain of both kinds."""
    return torchopt.chain(bilevel.optim.clip_by_norm(0.5), torchopt.adam(lr=lr, **hyperparameters))


def ours(roots):
    """Every optimizer of `bilevel.optim`, with `eps_root` drawn from `roots`."""
    adaptive = {"eps_root": roots, "weight_decay": decays}
    return st.one_of(
        builds(bilevel.optim.sgd, weight_decay=decays),
        builds(bilevel.optim.sgd, momentum=momenta, weight_decay=decays, nesterov=st.booleans()),
        builds(bilevel.optim.adam, betas=betas, **adaptive),
        builds(bilevel.optim.adamw, betas=betas, **adaptive),
        builds(
            bilevel.optim.rmsprop,
            alpha=st.floats(0.5, 0.99),
            momentum=st.sampled_from([0.0, 0.9]),
            centered=st.booleans(),
            **adaptive,
        ),
        builds(bilevel.optim.adagrad, **adaptive),
    )


torchopts = st.one_of(
    builds(torchopt.sgd, weight_decay=decays),
    builds(torchopt.sgd, momentum=momenta, nesterov=st.booleans()),
    builds(torchopt.adam, betas=betas, eps_root=roots, weight_decay=decays),
    builds(torchopt.adamw, betas=betas, eps_root=roots, weight_decay=decays),
    builds(torchopt.rmsprop, alpha=st.floats(0.5, 0.99), centered=st.booleans()),
    builds(torchopt.adagrad, weight_decay=decays),
    builds(clip_then_adam, eps_root=roots),
)
optimizers = ours(roots)
# Near a small gradient an adaptive step turns within √eps_root, far too fast for differences.
smooth_optimizers = ours(st.just(1e-2))
seeds = st.integers(0, 2**31)


@st.composite
def windows(draw):
    """(steps, start, stop) with 0 ≤ start < stop ≤ steps ≤ 8."""
    steps = draw(st.integers(1, 8))
    stop = draw(st.integers(1, steps))
    return steps, draw(st.integers(0, stop - 1)), stop


def solve(case, optimizer, steps, truncation, estimator, seed, outer=None, **keep):
    hypergradient = bilevel.Hypergradient(
        case.problem, optimizer, steps, truncation, estimator, **keep
    )
    return hypergradient(case.outer if outer is None else outer, case.outer_batch, seeded(seed))


def assert_same(actual, expected, tolerance=EXACT):
    """Agreement of every leaf by itself, so that a small one cannot hide behind a large one.

    The floor is for derivatives that cancel: the first step of Adagrad is ±lr, so nearly constant.
    """
    assert optree.tree_structure(actual) == optree.tree_structure(expected)
    for ours, theirs in zip(optree.tree_leaves(actual), optree.tree_leaves(expected), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm()) + 1e-15


def check_against_brute_force(name, make, rate, shape, seed, size, estimators):
    steps, start, stop = shape
    case = problems.make(name, seed % 1000, size)
    reference = problems.brute_force(
        case,
        case.optimizer(make, rate),
        bilevel.Key.draw(seeded(seed)),
        bilevel.Window(start, stop),
    )
    for estimator in estimators:
        optimizer = case.optimizer(make, rate)
        result = solve(case, optimizer, steps, Fixed(start, stop), estimator, seed)
        assert (result.window.start, result.window.stop) == (start, stop)
        assert_same([result.loss], [reference[0]])
        assert_same(result.grads, reference[1])


# The convolution's bias stands in front of GroupNorm, so its gradient is 0 up to rounding: only
# optimizers with an eps_root have a derivative there. Forward costs a run for every outer scalar.
SMALL = ["quadratic", "ridge", "data_cleaning", "learned_start"]


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=12)
@given(optimizers | torchopts, rates, windows(), seeds, st.integers(2, 5))
def test_every_estimator_is_autograd_through_the_window(name, make, rate, shape, seed, size):
    estimators = [Reverse(), Adjoint("reverse"), Adjoint("forward"), Forward()]
    check_against_brute_force(name, make, rate, shape, seed, size, estimators)


@settings(max_examples=12)
@given(optimizers, windows(), seeds, st.integers(2, 5))
def test_a_learned_rate(make, shape, seed, size):
    estimators = [Reverse(), Adjoint("reverse"), Adjoint("forward"), Forward()]
    check_against_brute_force("learned_rate", make, None, shape, seed, size, estimators)


@pytest.mark.parametrize("name", ["mlp_distillation", "convnet_distillation"])
@settings(max_examples=12)
@given(optimizers, rates, windows(), seeds, st.integers(2, 5))
def test_distillation(name, make, rate, shape, seed, size):
    estimators = [Reverse(), Adjoint("reverse"), Adjoint("forward")]
    check_against_brute_force(name, make, rate, shape, seed, size, estimators)


@settings(max_examples=3)
@given(optimizers, rates, seeds)
def test_distillation_in_forward_mode(make, rate, seed):
    check_against_brute_force("mlp_distillation", make, rate, (3, 0, 2), seed, 2, [Forward()])


@settings(max_examples=5)
@given(smooth_optimizers, rates, st.integers(1, 6), seeds)
@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_the_whole_run_is_the_derivative_of_the_outer_loss(name, make, rate, steps, seed):
    """Central differences along a random direction, through the forward run alone."""
    case = problems.make(name, seed % 1000)
    optimizer = case.optimizer(make, rate)
    hypergradient = bilevel.Hypergradient(case.problem, optimizer, steps)
    direction = optree.tree_map(
        lambda x: problems.randn(*x.shape, generator=seeded(seed)), case.outer
    )

    def loss(distance):
        outer = optree.tree_map(lambda x, d: x + distance * d, case.outer, direction)
        return float(hypergradient(outer, case.outer_batch, seeded(seed)).loss)

    grads = flat(hypergradient(case.outer, case.outer_batch, seeded(seed)).grads)
    slope = float(grads @ flat(direction))
    difference = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert abs(slope - difference) <= 1e-6 * float(grads.norm() * flat(direction).norm())


@given(
    st.sampled_from(list(problems.PROBLEMS)),
    optimizers,
    windows(),
    st.integers(1, 5),
    st.sampled_from([None, "cpu"]),
    st.sampled_from([Reverse(), Adjoint("reverse"), Adjoint("forward")]),
    seeds,
)
def test_keeping_fewer_iterates_changes_no_bit(name, make, shape, every, device, estimator, seed):
    steps, start, stop = shape
    case = problems.make(name, seed % 1000)
    run = partial(
        solve, case, case.optimizer(make, 0.05), steps, Fixed(start, stop), estimator, seed
    )
    kept, recomputed = run(), run(keep_every=every, keep_on=device)
    assert torch.equal(kept.loss, recomputed.loss)
    assert torch.equal(flat(kept.grads), flat(recomputed.grads))
    assert torch.equal(flat(kept.params), flat(recomputed.params))


@given(rates, windows(), seeds, st.integers(1, 6))
@pytest.mark.parametrize("estimator", [Reverse(), Adjoint(), Adjoint("forward"), Forward()])
def test_closed_form_of_the_quadratic_under_sgd(estimator, rate, shape, seed, size):
    """θ ← Mθ + ηBφ with M = I − ηA, so ∂θ_stop/∂φ over W steps is η (I + M + … + M^{W−1}) B."""
    steps, start, stop = shape
    case = problems.quadratic(seeded(seed), size)
    A, B, phi = case.problem.A, case.problem.B, case.outer["phi"]
    M = torch.eye(size, dtype=A.dtype) - rate * A
    theta = case.problem.start
    for _ in range(stop):
        theta = M @ theta + rate * (B @ phi)
    sensitivity = rate * sum(torch.linalg.matrix_power(M, k) for k in range(stop - start)) @ B
    expected = sensitivity.T @ (theta - case.outer_batch) + case.problem.penalty * phi

    optimizer = bilevel.optim.sgd(rate)
    result = solve(case, optimizer, steps, Fixed(start, stop), estimator, seed)
    assert_same(result.params["theta"], theta, 1e-12)
    assert_same(result.grads["phi"], expected, 1e-10)


class Identity(bilevel.Problem):
    """Outer tensors handed on untouched, as batch and as start."""

    def init(self, outer, *, generator):
        return outer["start"]

    def inner_batch(self, outer, step, *, generator):
        return outer["target"]

    def inner_loss(self, params, batch):
        return ((params - batch) ** 4).sum()

    def outer_loss(self, params, outer, batch):
        return (params**2).sum()


@pytest.mark.parametrize("estimator", [Reverse(), Adjoint(), Adjoint("forward"), Forward()])
def test_outer_tensors_may_be_passed_on_as_they_are(estimator):
    outer = {name: problems.randn(3, generator=seeded(i)) for i, name in enumerate("st")}
    case = problems.Case(Identity(), {"start": outer["s"], "target": outer["t"]}, None)
    optimizer = bilevel.optim.sgd(0.01, momentum=0.9)
    window = bilevel.Window(0, 4)
    expected = problems.brute_force(case, optimizer, bilevel.Key(0), window)
    result = solve(case, optimizer, 4, None, estimator, 0)
    assert_same(result.grads, expected[1])


class Anchored:
    """SGD pulled towards a running average of θ, whose state starts at θ_0 and so depends on φ."""

    def init(self, params):
        return {"average": params.clone(), "count": torch.zeros((), dtype=torch.int64)}

    def update(self, updates, state, *, params=None, inplace=False):
        average, count = 0.9 * state["average"] + 0.1 * params, state["count"] + 1
        updates = -0.05 * updates + 0.3 * (average**2 - params)
        return updates, {"average": average, "count": count}


@pytest.mark.parametrize("estimator", [Reverse(), Adjoint(), Adjoint("forward"), Forward()])
@pytest.mark.parametrize("start", [0, 2])
def test_an_optimizer_whose_state_starts_at_the_parameters(estimator, start):
    case = problems.make("quadratic", 0)
    outer = case.outer | {"theta": case.problem.start}
    case.problem.init = lambda outer, *, generator: outer["theta"]
    case.problem.inner_loss = lambda theta, batch: (
        0.5 * theta @ case.problem.A @ theta - theta @ batch
    )
    case.problem.outer_loss = lambda theta, outer, batch: (theta**3).sum()
    case = problems.Case(case.problem, outer, None)
    window = bilevel.Window(start, 4)
    expected = problems.brute_force(case, Anchored(), bilevel.Key(0), window)
    result = solve(case, Anchored(), 4, Fixed(start, 4), estimator, 0)
    assert_same([result.loss], [expected[0]])
    assert_same(result.grads, expected[1])
