"""Protocols: what optimizes a network in an evaluation, and for how long."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bilevel import Key
from dd.augmentation import DSA, FlipOrRotate, NoAugmentation
from dd.data import Standardize
from dd.data.prepared import PreparedData
from dd.evaluation.evaluator import Evaluator
from dd.evaluation.protocols import BPTTProtocol, DCProtocol


@given(st.integers(1, 3000), st.integers(1, 512), st.integers(1, 1000))
def test_dc_trains_for_epochs(images: int, batch: int, epochs: int) -> None:
    (steps,) = DCProtocol(epochs).steps([1, 2], images, batch)
    assert steps * batch >= epochs * images > (steps - epochs) * batch


def test_bptt_trains_for_the_wanted_steps_by_adam_at_one_rate() -> None:
    protocol = BPTTProtocol(2e-3)
    assert protocol.steps([3, 9], 1000, 10) == [3, 9]
    optimizer, schedule = protocol.optimizer([torch.zeros(1)], 9, rate=0.5)
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.param_groups[0]["lr"] == 2e-3
    assert schedule is None


@given(st.integers(4, 40), st.sampled_from([None, 0.03]))
def test_dc_divides_its_rate_by_ten_at_half_of_the_run(steps: int, rate: float | None) -> None:
    parameter = torch.zeros(1, requires_grad=True)
    optimizer, schedule = DCProtocol().optimizer([parameter], steps, rate)
    assert type(optimizer) is torch.optim.SGD
    assert schedule is not None
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)
    rates = []
    for _ in range(steps):
        rates.append(group["lr"])
        optimizer.step()
        schedule.step()
    first = 0.01 if rate is None else rate
    assert rates[0] == first
    assert rates[-1] == pytest.approx(first / 10)
    (drop,) = [index for index, (a, b) in enumerate(pairwise(rates)) if a != b]
    assert abs(drop + 1 - steps / 2) <= 1


def test_a_protocol_brings_its_augmentation_unless_another_is_given() -> None:
    assert isinstance(Evaluator().augmentation, FlipOrRotate)
    dc = Evaluator(protocol=DCProtocol())
    assert isinstance(dc.augmentation, DSA)
    assert isinstance(dc.without_augmentation().augmentation, NoAugmentation)
    assert isinstance(dc.augmentation, DSA)
    given_one = Evaluator(protocol=DCProtocol(), augmentation=NoAugmentation())
    assert isinstance(given_one.augmentation, NoAugmentation)


def test_a_protocol_must_be_one() -> None:
    with pytest.raises(ValueError, match=r"protocol is a str, not a Protocol"):
        Evaluator(protocol="dc")  # type: ignore[arg-type]


def test_dc_trains_at_the_rate_that_was_learned_with_the_set() -> None:
    """At a rate of nearly nothing, nothing is learned."""
    labels = torch.arange(12) % 3
    images = 3 * nn.functional.one_hot(labels, 3).float().view(12, 1, 1, 3)
    parts = (images, labels) * 3
    data = PreparedData(Standardize([0.0], [1.0]), ("a", "b", "c"), *parts)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
    judge = Evaluator(networks=3, protocol=DCProtocol(30), augmentation=NoAugmentation())
    arguments = images, labels, network, data, Key(0)
    learned = judge.distilled(*arguments, rate=0.3)
    assert learned.mean == 1
    assert learned.steps == 30
    assert judge.distilled(*arguments, rate=1e-9).mean < 1
