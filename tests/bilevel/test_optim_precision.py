"""What rounding does to an optimizer: bias corrections, variances, parameters of 16 bits."""

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimizers import ONE_OF_EACH
from problems import seeded

import bilevel
from bilevel import optim

DOUBLE = torch.float64
LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def run(transformation, params, gradient_of, steps):
    state = transformation.init(params)
    for _ in range(steps):
        updates, state = transformation.update(gradient_of(params), state, params=params)
        params = optree.tree_map(torch.add, params, updates)
    return params


def run_torch(make, params, gradient_of, steps):
    leaf = torch.nn.Parameter(params.clone())
    optimizer = make([leaf])
    for _ in range(steps):
        leaf.grad = gradient_of(leaf.detach())
        optimizer.step()
    return leaf.detach()


beta = st.one_of(st.floats(0, 0.999), st.sampled_from([0.9, 0.99, 0.999, 0.9999, 0.99999]))


@pytest.mark.parametrize(
    ("ours", "theirs"), [(optim.adam, torch.optim.Adam), (optim.adamw, torch.optim.AdamW)]
)
@given(beta, beta, st.integers(1, 60), st.integers(0, 2**31))
def test_adam_in_float32_is_as_near_the_truth_as_torch(ours, theirs, beta1, beta2, steps, seed):
    draws = torch.randn(2, 50, generator=seeded(seed), dtype=DOUBLE).float()

    def gradient_of(params):
        return 2 * (params - draws[1].to(params.dtype))

    betas = beta1, beta2
    truth = run_torch(lambda p: theirs(p, 0.05, betas), draws[0].double(), gradient_of, steps)
    yardstick = run_torch(lambda p: theirs(p, 0.05, betas), draws[0], gradient_of, steps)
    found = run(ours(0.05, betas, eps_root=0.0), draws[0], gradient_of, steps)
    assert found.dtype == torch.float32
    assert (found - truth).norm() <= 3 * (yardstick - truth).norm() + 1e-6 * truth.norm()


@given(beta, beta, st.integers(1, 60), st.booleans(), st.integers(0, 2**31))
def test_betas_that_are_learned_are_as_precise(beta1, beta2, steps, each, seed):
    """Values and derivatives in float32 against float64, betas as scalars or one an entry."""
    generator = seeded(seed)
    grads = torch.randn(steps, 20, generator=generator, dtype=DOUBLE)
    grads = (grads.abs() + 0.3).float()
    weights = torch.rand(20, generator=generator, dtype=DOUBLE)
    shape = (20,) if each else ()

    def values(dtype):
        betas = [torch.full(shape, b).to(dtype).requires_grad_() for b in (beta1, beta2)]
        transformation = optim.adam(0.1, betas)
        params = torch.zeros(20, dtype=dtype)
        state = transformation.init(params)
        for grad in grads.to(dtype):
            updates, state = transformation.update(grad, state, params=params)
            params = params + updates
        slopes = torch.autograd.grad((params * weights.to(dtype)).sum(), betas)
        return params.detach().double(), [slope.double() for slope in slopes]

    (found, slopes), (truth, exact) = values(torch.float32), values(DOUBLE)
    assert (found - truth).norm() <= 1e-5 * truth.norm()
    for slope, expected in zip(slopes, exact, strict=True):
        assert (slope - expected).norm() <= 1e-4 * expected.norm() + 1e-6


@pytest.mark.parametrize(
    ("alpha", "steps", "lr", "scale"),
    [
        (0.9, 1000, 1e-3, 1.0),
        (0.9, 1000, 1e-9, 1e3),
        (0.99, 3000, 1e-3, 1.0),
        (0.5, 400, 1.0, 1e-3),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_centred_rmsprop_of_a_constant_gradient_stays_finite(alpha, steps, lr, scale, dtype):
    """And so does its derivative."""
    gradient = scale * (torch.rand(100, generator=seeded(0), dtype=dtype) + 0.5)
    transformation = optim.rmsprop(lr, alpha=alpha, centered=True)
    state = transformation.init(gradient)
    for _ in range(steps):
        updates, state = transformation.update(gradient, state)
        assert bool(torch.isfinite(updates).all())
    assert bool((state.square >= 0).all())

    def after(gradient):
        return transformation.update(gradient, state)[0]

    updates, pull, *_ = torch.func.vjp(after, gradient)
    assert bool(torch.isfinite(pull(torch.ones_like(updates))[0]).all())


@given(st.floats(0.0, 0.99), st.integers(1, 40), st.integers(0, 2**31))
def test_the_recursion_of_the_variance_is_the_difference(alpha, steps, seed):
    grads = torch.randn(steps, 5, generator=seeded(seed), dtype=DOUBLE)
    transformation = optim.rmsprop(0.1, alpha=alpha, centered=True)
    state = transformation.init(grads[0])
    square, mean = torch.zeros(5, dtype=DOUBLE), torch.zeros(5, dtype=DOUBLE)
    for grad in grads:
        _, state = transformation.update(grad, state)
        square = alpha * square + (1 - alpha) * grad**2
        mean = alpha * mean + (1 - alpha) * grad
        torch.testing.assert_close(state.square, square - mean**2, rtol=0, atol=1e-14)


# 16 bits.


@LOW
@pytest.mark.parametrize(
    "name", sorted(set(ONE_OF_EACH) - {"freeze", "clip_by_norm", "clip_by_value"})
)
def test_parameters_of_16_bits_train_as_those_of_32(name, dtype):
    """Many steps, each far below what the parameters can resolve."""
    small = {
        "sgd": optim.sgd(1e-3, momentum=0.9, weight_decay=0.01),
        "adam": optim.adam(3e-4),
        "adamw": optim.adamw(3e-4),
        "rmsprop": optim.rmsprop(3e-4, momentum=0.5, centered=False),
        "adagrad": optim.adagrad(1e-2),
        "chain": optim.chain(optim.clip_by_norm(0.5), optim.clip_by_value(0.3), optim.sgd(1e-2)),
        "groups": optim.groups({"a": optim.adam(3e-4), "*": optim.sgd(1e-3)}),
    }[name]
    goal = {"a": torch.tensor([3.0, -2.0, 0.1]), "b": torch.tensor(1.5)}

    def gradient_of(params):
        return optree.tree_map(lambda p, c: 2 * (p - c.to(p.dtype)), params, goal)

    start = optree.tree_map(torch.ones_like, goal)
    wide = run(small, start, gradient_of, 400)
    low = run(small, optree.tree_map(lambda p: p.to(dtype), start), gradient_of, 400)
    resolution = torch.finfo(dtype).eps
    for ours, theirs, first in zip(*map(optree.tree_leaves, (low, wide, start)), strict=True):
        assert ours.dtype == dtype
        assert float((theirs - first).abs().max()) > 10 * resolution  # it does train
        assert float((ours.float() - theirs).abs().max()) <= 4 * resolution * (
            1 + float(theirs.abs().max())
        )


@LOW
@given(st.lists(st.floats(-1e-2, 1e-2), min_size=1, max_size=60), st.floats(-4, 4))
def test_the_remainder_makes_up_for_what_rounding_cuts_off(dtype, steps, start):
    """θ + r is the run in float32, whatever the steps."""
    transformation = optim.sgd(1.0)
    params = torch.tensor([start]).to(dtype)
    master, state = params.float(), transformation.init(params)
    for step in steps:
        grad = torch.tensor([step]).to(dtype)
        updates, state = transformation.update(grad, state, params=params)
        params = params + updates
        master = master - grad.float()
        assert params.dtype == updates.dtype == dtype
    torch.testing.assert_close(params.float() + state.remainder, master, rtol=1e-5, atol=1e-5)


@LOW
def test_without_parameters_16_bits_are_refused(dtype):
    transformation = optim.sgd(0.1)
    params = torch.ones(2, dtype=dtype)
    with pytest.raises(bilevel.ConfigurationError, match="16 bits need"):
        transformation.update(params, transformation.init(params))


class Pull(bilevel.Problem):
    """Towards φ, from 1."""

    def __init__(self, dtype):
        self.dtype = dtype

    def init(self, outer, *, generator):
        return torch.ones(4, dtype=self.dtype)

    def inner_batch(self, outer, step, *, generator):
        return outer.to(self.dtype)

    def inner_loss(self, params, batch):
        return ((params - batch) ** 2).sum()

    def outer_loss(self, params, outer, batch):
        return (params.to(outer.dtype) ** 2).sum()


@LOW
@pytest.mark.parametrize("optimizer", [optim.adam(0.05), optim.sgd(0.05, momentum=0.5)])
@pytest.mark.parametrize(
    "estimator",
    [bilevel.estimators.Adjoint(), bilevel.estimators.Reverse()],
    ids=["adjoint", "reverse"],
)
def test_hypergradients_through_16_bits_are_those_of_64_up_to_rounding(dtype, optimizer, estimator):
    outer = torch.tensor([3.0, -2.0, 0.1, 1.5])
    truth = bilevel.Hypergradient(Pull(DOUBLE), optimizer, 10)(outer.double())
    found = bilevel.Hypergradient(Pull(dtype), optimizer, 10, None, estimator)(outer)
    assert found.params.dtype == dtype
    error = (found.grads.double() - truth.grads).norm() / truth.grads.norm()
    assert float(error) < 40 * torch.finfo(dtype).eps
