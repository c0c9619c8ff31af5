"""The clip by a moving average of the norm."""

import contextlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel.clip import MovingAverageClip, MovingAverageRowClip

norms = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12)
decays, factors = st.floats(0, 0.99), st.floats(0.1, 5)


def tensors(norm):
    """Two tensors whose gradients have the joint norm `norm`, one of them a matrix."""
    pair = [torch.zeros(2, 2, dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    pair[0].grad = torch.tensor([[0.6 * norm, 0.0], [0.0, 0.0]], dtype=torch.float64)
    pair[1].grad = torch.tensor(-0.8 * norm, dtype=torch.float64)
    return pair


def length(pair):
    return math.hypot(*(float(tensor.grad.norm()) for tensor in pair))


@given(norms, decays, factors)
def test_the_formula(norms, decay, factor):
    clip, average = MovingAverageClip(decay, factor), norms[0]
    for norm in norms:
        pair = tensors(norm)
        average = decay * average + (1 - decay) * norm
        bound = factor * average
        assert clip(pair) == pytest.approx((norm, bound), rel=1e-12)
        assert length(pair) == pytest.approx(min(norm, bound), rel=1e-12)
        # Only the length changes.
        scale = min(norm, bound) / norm
        assert float(pair[0].grad[0, 0]) == pytest.approx(0.6 * norm * scale, rel=1e-12)
        assert float(pair[1].grad) == pytest.approx(-0.8 * norm * scale, rel=1e-12)


@given(norms, decays, factors)
def test_it_never_lengthens(norms, decay, factor):
    clip = MovingAverageClip(decay, factor)
    for norm in norms:
        pair = tensors(norm)
        clip(pair)
        assert length(pair) <= norm * (1 + 1e-15)


@given(st.floats(1e-6, 1e6), decays, st.floats(1, 5))
def test_the_first_gradient_is_left_alone(norm, decay, factor):
    """To the bit, with a factor of 1 as well: then the bound is the norm itself, or an ulp off."""
    pair, untouched = tensors(norm), tensors(norm)
    MovingAverageClip(decay, factor)(pair)
    for tensor, other in zip(pair, untouched, strict=True):
        torch.testing.assert_close(tensor.grad, other.grad, rtol=1e-15, atol=0)


@given(norms, norms, decays, factors)
def test_state_round_trips(before, after, decay, factor):
    one, other = MovingAverageClip(decay, factor), MovingAverageClip(decay, factor)
    for norm in before:
        one(tensors(norm))
    other.load_state_dict(one.state_dict())
    assert [one(tensors(norm)) for norm in after] == [other(tensors(norm)) for norm in after]
    fresh = MovingAverageClip(decay, factor)
    one.load_state_dict(fresh.state_dict())
    assert [one(tensors(norm)) for norm in after] == [fresh(tensors(norm)) for norm in after]


def test_a_zero_gradient_stays_zero_and_does_no_harm():
    clip = MovingAverageClip(0.5, 2.0)
    for _ in range(2):
        pair = tensors(0.0)
        assert clip(pair) == (0.0, 0.0)
        assert length(pair) == 0
    pair = tensors(1.0)
    assert clip(pair) == (1.0, 1.0)
    assert length(pair) == pytest.approx(1.0, rel=1e-15)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_does_not_end_the_clipping(value):
    """Refused or passed over, but the next gradient is judged by an average that is a number."""
    clip = MovingAverageClip(0.9, 2.0)
    clip(tensors(1.0))
    with contextlib.suppress(bilevel.NonFiniteError):
        clip(tensors(value))
    pair = tensors(1e6)
    _, bound = clip(pair)
    assert math.isfinite(bound)
    assert length(pair) == pytest.approx(bound, rel=1e-12)


def test_it_scales_in_place():
    clip = MovingAverageClip(0.9, 0.5)
    pair = tensors(1.0)
    grads = [tensor.grad for tensor in pair]
    clip(iter(pair))
    assert all(tensor.grad is grad for tensor, grad in zip(pair, grads, strict=True))
    assert length(pair) == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_bad_decay_is_named(decay):
    with pytest.raises(bilevel.ConfigurationError, match=f"decay={decay}"):
        MovingAverageClip(decay=decay)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_a_bad_factor_is_named(factor):
    with pytest.raises(bilevel.ConfigurationError, match=f"factor={factor}"):
        MovingAverageClip(factor=factor)


def test_every_tensor_must_have_a_gradient():
    with_one, without = tensors(1.0)[0], torch.zeros(2)
    for given_ in ([], [without], [with_one, without]):
        with pytest.raises(bilevel.ConfigurationError, match="gradient"):
            MovingAverageClip()(given_)


@given(st.floats(1.0, 10.0), st.floats(0.0, 0.99), st.floats(1e-3, 1e6))
def test_with_a_cap_an_outlier_moves_the_average_by_so_much_at_most(cap, decay, outlier):
    clip = MovingAverageClip(decay, 2.0, cap)
    clip(tensors(1.0))
    pair = tensors(outlier)
    _, bound = clip(pair)
    assert bound == pytest.approx(2 * (decay + (1 - decay) * min(outlier, cap)), rel=1e-9)
    assert length(pair) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("cap", [0.5, "two", float("nan")])
def test_a_bad_cap_is_named(cap):
    with pytest.raises(bilevel.ConfigurationError, match="cap="):
        MovingAverageClip(cap=cap)


def rows(*lengths):
    """Two tensors, an image batch and a vector, whose rows' gradients have these norms."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(len(lengths), 2, 3, dtype=torch.float64, generator=generator)
    directions /= torch.linalg.vector_norm(directions, dim=(1, 2), keepdim=True)
    grad = directions * torch.tensor(lengths, dtype=torch.float64)[:, None, None]
    tensors = [torch.zeros_like(grad[1:]), torch.zeros(1, dtype=torch.float64)]
    tensors[0].grad, tensors[1].grad = grad[1:].clone(), grad.new_tensor(lengths[:1])
    return tensors


def row_norms(tensors):
    matrix, vector = (tensor.grad for tensor in tensors)
    return [*vector.abs().tolist(), *torch.linalg.vector_norm(matrix, dim=(1, 2)).tolist()]


row_lengths = st.lists(
    st.lists(st.just(0.0) | st.floats(1e-6, 1e6), min_size=4, max_size=4), min_size=1, max_size=6
)


@given(row_lengths, decays, factors)
def test_each_row_is_clipped_on_its_own(steps, decay, factor):
    clip, average = MovingAverageRowClip(decay, factor), None
    for lengths in steps:
        pair, before = rows(*lengths), rows(*lengths)
        counted = [length for length in lengths if length > 0]
        mean = sum(counted) / max(len(counted), 1)
        average = mean if average is None else decay * average + (1 - decay) * mean
        bound = factor * average
        assert clip(pair) == pytest.approx((mean, bound), rel=1e-12)
        assert row_norms(pair) == pytest.approx([min(length, bound) for length in lengths])
        for tensor, other in zip(pair, before, strict=True):
            for row, original in zip(tensor.grad, other.grad, strict=True):  # only lengths change
                torch.testing.assert_close(
                    row * torch.linalg.vector_norm(original),
                    original * torch.linalg.vector_norm(row),
                )


def test_an_outlier_among_rows_leaves_the_others_alone():
    pair = rows(1.0, 1.0, 1.0, 100.0)
    others = pair[0].grad[:2].clone()
    MovingAverageRowClip(0.9, 1.0)(pair)
    assert torch.equal(pair[0].grad[:2], others)
    assert row_norms(pair)[3] == pytest.approx(103 / 4)


def test_with_one_row_the_row_clip_is_the_joint_clip():
    row, joint = MovingAverageRowClip(0.5, 1.5, 2.0), MovingAverageClip(0.5, 1.5, 2.0)
    for norm in (1.0, 5.0, 0.1, 0.0, 30.0):
        pairs = [torch.zeros(1, 3, dtype=torch.float64) for _ in range(2)]
        for tensor in pairs:
            tensor.grad = torch.tensor([[0.6 * norm, 0.0, 0.8 * norm]], dtype=torch.float64)
        assert row([pairs[0]]) == pytest.approx(joint([pairs[1]]), rel=1e-12)
        torch.testing.assert_close(pairs[0].grad, pairs[1].grad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_refused_and_the_average_stays(value):
    clip = MovingAverageRowClip()
    clip(rows(1.0, 1.0))
    with pytest.raises(bilevel.NonFiniteError):
        clip(rows(1.0, value))
    assert clip.state_dict() == {"average": 1.0}


def test_a_scalar_is_a_row():
    tensor = torch.tensor(0.0)
    tensor.grad = torch.tensor(4.0)
    MovingAverageRowClip(factor=0.5)([tensor])
    assert float(tensor.grad) == 2.0
