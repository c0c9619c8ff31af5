"""Where memory runs out, what to lower is said, and by how much."""

import re
from typing import Any

import pytest
import torch
from tiny_runs import experiment

from dd.distillation import memory
from dd.distillation.memory import out_of_memory_advice, parts
from dd.objectives.base import Task
from dd.runtime.memory import check_fits, ran_out


def made(*lines: str, **changes: Any) -> tuple[Any, Task]:
    whole = experiment(*lines, **changes)
    return whole.distiller, whole.task(whole.prepare(), None)


def test_what_an_image_keeps_is_what_autograd_keeps() -> None:
    """Of an image: itself, 8 channels of 8×8 before and after the norm, and what is pooled."""
    settings, task = made(RealImages__real_batch=7)
    (outer,) = [part for part in parts(settings, task) if part.option.startswith("RealImages")]
    pixels = 4 * (64 + 8 * 64 + 8 * 64 + 8 * 16)
    assert outer.value == 7
    # GroupNorm keeps two numbers a channel.
    assert 7 * pixels <= outer.bytes <= 7 * (pixels + 4 * 64)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"RealImages__real_batch": 1000, "RealImages__real_micro_batch": 800},
            "largest part is the outer loss, about .* from 800 to 400, which takes",
        ),
        (
            {"SyntheticDataset__images_per_class": 100, "RealImages__real_batch": 10},
            "an inner step, .*: lower SyntheticDataset.classes_per_step from 10 to 5,",
        ),
        (
            {"Distiller__keep_every": 1, "Distiller__inner_steps": 10**5},
            "the inner iterates, .*: set Distiller.keep_on = 'cpu', or Distiller.keep_every = 2",
        ),
    ],
)
def test_the_largest_part_is_to_be_lowered(changes: dict[str, Any], said: str) -> None:
    assert re.search(said, out_of_memory_advice(*made(**changes)))


def test_it_is_lowered_to_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, task = made(RealImages__real_batch=1000, RealImages__real_micro_batch=1000)
    largest, *others = parts(settings, task)
    room = largest.bytes // 10
    there = int((sum(part.bytes for part in others) + room) / memory.SHARE)
    monkeypatch.setattr(memory, "total", lambda device: there)
    assert re.search(
        "real_micro_batch from 1000 to (99|100),", out_of_memory_advice(settings, task)
    )


def test_running_out_of_memory_is_recognised_on_both_kinds_of_device() -> None:
    assert ran_out(MemoryError())
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(2**55, dtype=torch.uint8)
    assert ran_out(cpu.value)
    assert not ran_out(RuntimeError("shapes do not fit"))


def test_what_can_not_fit_at_all_is_refused_with_what_would() -> None:
    with pytest.raises(ValueError, match=r"images_per_class=1000000000000: .* at most \d+ fit"):
        check_fits("images_per_class", 10**12, 10**6, torch.device("cpu"))
