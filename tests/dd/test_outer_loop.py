"""The outer loop as one iterates over it: what it tells, in which order, and what is kept of it."""

from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import OUTER_STEPS, distil, experiment

import bilevel
from dd.data.prepared import PreparedData
from dd.distillation import loop
from dd.distillation.events import Validated, Validating
from dd.distillation.loop import (
    MOST_SKIPPED,
    Distillation,
    Event,
    Finished,
    Ready,
    Skipped,
    StageChanged,
    Stepped,
    begin,
    outer_loop,
)

STAGES: dict[str, Any] = {
    "Distiller__truncation": "@StageAware()",
    "StageAware__window": 3,
    "StageAware__width_range": 1,
    "StageAware__transition": "@ByFraction()",
}


@cache
def data() -> PreparedData:
    return experiment().prepare()


def begun(**changes: Any) -> Distillation:
    """A run of which nothing is kept on disk."""
    made = experiment(**changes)
    return begin(made.distiller, made.task(data(), None))


def kinds(events: list[Event]) -> list[type]:
    return [type(event) for event in events]


def test_every_step_is_told_between_two_moments_at_which_nothing_is_half_done() -> None:
    run = begun(Distiller__outer_steps=3)
    events = list(outer_loop(run))
    assert kinds(events) == [Ready, *[Stepped, Ready] * 3, Finished]
    assert [event.step for event in events] == [0, 1, 1, 2, 2, 3, 3, 3]
    for event in events:
        if isinstance(event, Stepped):
            assert event.seconds > 0
            assert event.clip_bound is not None
            assert set(event.metrics) == {"accuracy"}
            assert float(event.result.loss) > 0


def test_what_else_happens_follows_the_step() -> None:
    run = begun(**STAGES, Distiller__outer_steps=3, Distiller__validate_every=2)
    events = list(outer_loop(run))
    after_second = [type(event) for event in events if event.step == 2]
    assert after_second == [Stepped, StageChanged, Validating, Validated, Ready]
    (changed, _) = [event for event in events if isinstance(event, StageChanged)]
    assert "stage ends" in changed.sentence
    (validating,) = [event for event in events if isinstance(event, Validating)]
    assert validating.seconds > 0
    (validated,) = [event for event in events if isinstance(event, Validated)]
    assert validated.best == "images"
    assert set(validated.accuracy) == {"images"}
    assert validated.accuracy["images"] == run.state.best_accuracy


def test_a_loop_that_is_left_where_it_is_ready_goes_on_to_the_same_bits() -> None:
    whole, parts = begun(), begun()
    for _ in outer_loop(whole):
        pass
    for until in (2, 2, None):
        for event in outer_loop(parts):
            if isinstance(event, Ready) and event.step == until:
                break
    assert parts.state.step == OUTER_STEPS
    assert torch.equal(parts.state.outer["images"], whole.state.outer["images"])


def test_the_set_can_be_taken_at_any_moment() -> None:
    run = begun(Distiller__average_decay=0.9)
    for event in outer_loop(run):
        if isinstance(event, Ready) and event.step == 2:
            break
    now, average = run.candidate("images"), run.candidate("average")
    assert torch.equal(now.images, run.state.outer["images"].detach())
    assert now.provenance["outer_step"] == 2
    assert not torch.equal(now.images, average.images)


# Steps without a finite hypergradient.


def failing(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the hypergradient of some outer steps, from 0, not finite."""
    step = loop.outer_step

    def sometimes(run: Distillation) -> Any:
        if run.state.step in steps:
            raise bilevel.NonFiniteError("the hypergradient is nan")
        return step(run)

    monkeypatch.setattr(loop, "outer_step", sometimes)


def test_a_step_that_is_not_finite_is_skipped_and_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, 1)
    run = begun(Distiller__outer_steps=3)
    events = list(outer_loop(run))
    assert kinds(events) == [Ready, Stepped, Ready, Skipped, Ready, Stepped, Ready, Finished]
    distil(experiment(Distiller__outer_steps=3), data(), tmp_path)
    assert "outer step 1 skipped: the hypergradient is nan" in capfd.readouterr().err


def test_too_many_in_a_row_end_the_run_but_not_as_many_in_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fine = (5, MOST_SKIPPED)
    failing(monkeypatch, *(step for step in range(50) if step not in fine))
    run = begun(Distiller__outer_steps=50)
    with pytest.raises(bilevel.NonFiniteError):
        deque(outer_loop(run))
    assert run.state.step == fine[-1] + MOST_SKIPPED
