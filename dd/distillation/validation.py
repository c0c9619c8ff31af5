"""A look, along the way, at how good the set is: on the validation split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dd.distillation.events import Validated

if TYPE_CHECKING:
    from dd.distillation.loop import Distillation

#: Which networks judge a candidate in a validation: a step has others for each of the two.
CANDIDATE_KEYS = {"images": "validation", "average": "validation/accuracy_of_average"}


def validate(run: Distillation) -> Validated:
    """Judge the set, and its average if there is one, on the validation split."""
    state, task = run.state, run.task
    accuracy: dict[str, float] = {}
    best = None
    for name in ("images",) if state.average is None else ("images", "average"):
        candidate = run.candidate(name)
        accuracy[name] = task.evaluator.validation(
            candidate.images,
            candidate.labels,
            task.network,
            task.data,
            task.key.fold(CANDIDATE_KEYS[name], state.step),
            candidate.provenance.get("learning_rate"),
        )
        if state.best_accuracy is None or accuracy[name] > state.best_accuracy:
            state.best_accuracy, state.best_step, best = accuracy[name], state.step, name
    return Validated(state.step, accuracy, best)


def expected_seconds(run: Distillation) -> float:
    """Of a validation: as long as the last one, or by a few steps of training."""
    if run.validation_seconds is not None:
        return run.validation_seconds
    task, candidate = run.task, run.candidate("images")
    of_one = task.evaluator.expected_validation_seconds(
        candidate.images, candidate.labels, task.network, task.data, task.key
    )
    return of_one * (1 if run.state.average is None else 2)
