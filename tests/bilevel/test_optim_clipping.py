"""Clipping inside the inner run: differentiated, and finite wherever the gradient is."""

import optree
import problems
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import brute_force, flat, randn, relative_error, seeded
from torch.autograd import gradcheck

import bilevel
from bilevel import optim

seeds = st.integers(0, 2**31)


def clipped(transformation, grads):
    return transformation.update(grads, transformation.init(grads))[0]


@given(st.floats(-3, 3), st.floats(1e-2, 10), seeds)
def test_the_norm_of_all_leaves_is_bounded_and_nothing_else_changes(size, bound, seed):
    generator = seeded(seed)
    grads = {"a": randn(3, 2, generator=generator), "b": [randn(generator=generator)]}
    grads = optree.tree_map(lambda g: g * 10**size, grads)
    norm = flat(grads).norm()
    expected = optree.tree_map(lambda g: g * min(1.0, float(bound / norm)), grads)
    found = clipped(optim.clip_by_norm(bound), grads)
    assert relative_error(found, expected) < 1e-14
    if norm < bound:
        assert torch.equal(flat(found), flat(grads))


@given(st.floats(-3, 3), seeds)
def test_the_derivative_of_the_clip_is_that_of_the_formula(bound, seed):
    generator = seeded(seed)
    grads = (
        randn(3, 2, generator=generator).requires_grad_(),
        randn(generator=generator).requires_grad_(),
    )
    norm = flat(grads).norm().detach()
    limit = torch.tensor(10**bound, dtype=torch.float64)
    assume(abs(norm - limit) > 1e-3 * limit)

    def by_norm(limit, *grads):
        return clipped(optim.clip_by_norm(limit), grads)

    def by_value(limit, *grads):
        return clipped(optim.clip_by_value(limit), grads)

    assert gradcheck(by_norm, (limit.requires_grad_(), *grads))
    if bool(((flat(grads).abs() - limit).abs() > 1e-3 * limit).all()):
        assert gradcheck(by_value, (limit.requires_grad_(), *grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-45, 1e30, 3e38])
@pytest.mark.parametrize("limit", [1e-6, 1.0, 1e6])
def test_no_size_of_a_gradient_is_too_small_or_too_large(dtype, value, limit):
    grads = torch.tensor([value, -value, 0.0], dtype=dtype, requires_grad=True)
    found = clipped(optim.clip_by_norm(limit), grads)
    assert float(found.detach().double().norm()) <= limit * (1 + 1e-6)
    if value > limit:
        torch.testing.assert_close(found.detach().norm(), torch.tensor(limit, dtype=dtype))
    found.sum().backward()
    assert bool(torch.isfinite(grads.grad).all())
    if value == 0:
        assert torch.equal(grads.grad, torch.ones_like(grads))


def test_what_is_not_finite_stays_so():
    for value in (float("nan"), float("inf")):
        grads = torch.tensor([1.0, value])
        assert not bool(torch.isfinite(clipped(optim.clip_by_norm(1.0), grads)).all())
    found = clipped(optim.clip_by_value(1.0), torch.tensor([2.0, float("nan")]))
    assert float(found[0]) == 1
    assert bool(found[1].isnan())


@given(
    st.sampled_from(["data_cleaning", "mlp_distillation", "learned_start"]), st.booleans(), seeds
)
@settings(max_examples=10)
def test_a_clipped_run_is_differentiated_exactly(name, by_norm, seed):
    case = problems.make(name, seed)
    clip = optim.clip_by_norm(0.2) if by_norm else optim.clip_by_value(0.05)
    optimizer = optim.chain(clip, optim.sgd(0.3, momentum=0.5))
    window = bilevel.Window(0, 5)
    key = bilevel.Key.draw(seeded(seed))
    loss, grads = brute_force(case, optimizer, key, window)
    for estimator in (bilevel.estimators.Adjoint(), bilevel.estimators.Forward()):
        if isinstance(estimator, bilevel.estimators.Forward) and name != "data_cleaning":
            continue
        found = bilevel.Hypergradient(case.problem, optimizer, 5, None, estimator)(
            case.outer, case.outer_batch, seeded(seed)
        )
        assert relative_error(found.loss, loss) < 1e-10
        assert relative_error(found.grads, grads) < 1e-8


@pytest.mark.parametrize("make", [optim.clip_by_norm, optim.clip_by_value])
@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), "1", None, True])
def test_bounds_are_above_zero(make, bad):
    with pytest.raises(bilevel.ConfigurationError, match="must be a finite number above 0"):
        make(bad)


@pytest.mark.parametrize("bad", [{"a": 1.0}, torch.ones(3), [1.0]])
def test_there_is_one_norm(bad):
    with pytest.raises(bilevel.ConfigurationError, match=r"max_norm.*one number.*groups"):
        optim.clip_by_norm(bad)
