"""Reading ahead: the same results as reading on the spot, but earlier."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dd.data.prepared import STEPS_AHEAD, ReadAhead


def index(step: int) -> Tensor:
    return torch.tensor([step, step**2])


@settings(max_examples=15)
@given(steps=st.lists(st.integers(0, 9), min_size=1, max_size=10))
def test_any_order_of_steps_gives_what_reading_on_the_spot_gives(steps: list[int]) -> None:
    ahead = ReadAhead(index, lambda wanted: wanted * 10)
    for step in steps:
        found, read = ahead.at(step)
        assert torch.equal(found, index(step))
        assert torch.equal(read, index(step) * 10)


def test_the_next_steps_are_read_before_they_are_asked_for() -> None:
    started = [threading.Event() for _ in range(10)]

    def read(wanted: Tensor) -> Tensor:
        started[int(wanted[0])].set()
        return wanted

    ahead = ReadAhead(index, read)
    ahead.at(0)
    for step in range(1, STEPS_AHEAD + 1):
        assert started[step].wait(timeout=10)
    assert not started[STEPS_AHEAD + 1].is_set()


def test_a_step_is_read_once() -> None:
    read: list[int] = []

    def record(wanted: Tensor) -> Tensor:
        read.append(int(wanted[0]))
        return wanted

    ahead = ReadAhead(index, record)
    for step in range(6):
        ahead.at(step)
    assert sorted(set(read)) == sorted(read)


def test_an_error_comes_at_the_step_it_belongs_to() -> None:
    def read(wanted: Tensor) -> Tensor:
        if int(wanted[0]) == 2:
            raise OSError("the disk is gone")
        return wanted

    ahead = ReadAhead(index, read)
    for step in (0, 1, 3):
        ahead.at(step)
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.at(2)
