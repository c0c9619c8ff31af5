"""The outer loop: one outer step, and the events of a whole distillation.

    for event in outer_loop(begin(settings, task)):
        ...

Saving, showing and stopping are the caller's; `dd.distillation.recorder` is what the commands do.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch

import bilevel
from bilevel.distributed import (
    AveragedHypergradient,
    broadcast_,
    gather,
    side_by_side,
    world_size,
)
from bilevel.tree import to_device
from dd.distillation.events import (
    Event,
    Finished,
    Ready,
    Skipped,
    StageChanged,
    Stepped,
    Validating,
    WentBack,
)
from dd.distillation.resuming import (
    CHECKPOINT,
    DAMAGED,
    changed,
    missed,
    restored,
)
from dd.distillation.settings import Distiller
from dd.distillation.state import TrainingState
from dd.distillation.validation import expected_seconds, validate
from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.recipe import student_recipe
from dd.objectives.base import HELD_OUT, Task
from dd.runtime.precision import allow_tf32
from dd.runtime.processes import from_first_process, is_first_process, own_key

#: Outer steps in a row whose hypergradient may be non-finite (and is skipped) before giving up.
MOST_SKIPPED = 10


@final
class Distillation:
    """What the outer steps of one run work with.

    Of several processes each has its own initialisations, windows and real images, keyed by
    (seed, rank, outer step). Their hypergradients are averaged, so all go through the same states;
    the first one keeps the time and the schedule.

    Args:
        settings: Of the outer loop.
        task: What to work on.
        state: Where to begin; it is what changes.
        notes: What the user should know of how it begins.
    """

    def __init__(
        self, settings: Distiller, task: Task, state: TrainingState, notes: Sequence[str] = ()
    ) -> None:
        allow_tf32(settings.tf32)
        self.settings = settings
        self.task = task
        self.state = state
        self.notes = notes
        #: How long the last validation took.
        self.validation_seconds: float | None = None
        #: Whether an outer step is being applied, so that the state is none to be saved.
        self.half_done = False
        #: The schedule's state when nothing was half done last; a step may change it at its start.
        self.schedule = state.truncation.state_dict()
        self.key = own_key(task.key)
        self.objective = settings.objective.prepare(task, self.key, state.truncation.stage)
        self.hypergradient = bilevel.Hypergradient(
            self.objective.problem,
            optimizer=settings.optimizer,
            steps=settings.inner_steps,
            truncation=state.truncation,
            estimator=settings.estimator,
            keep_every=settings.keep_every,
            keep_on=settings.keep_on,
            inner_replicas=settings.inner_replicas,
            compile=settings.compiles,
        )
        self.averaged = AveragedHypergradient(self.hypergradient)

    def candidate(self, name: str) -> DistilledSet:
        """The set as it is now, with the "images" as they are or their "average"."""
        state, task = self.state, self.task
        parameterisation = task.synthetic.parameterisation
        stored = state.average if name == "average" else task.synthetic.stored(state.outer)
        assert stored is not None, "there is an average where one is asked for"
        kept, coded = {}, {}
        if not parameterisation.lossless:
            kept = {name: value.detach() for name, value in stored.items()}
            coded = {"parameterisation": str(parameterisation)}
        images = parameterisation.decode(stored).detach()
        learned = self.settings.objective.provenance(state.outer)
        return DistilledSet(
            images=images,
            labels=task.synthetic.labels(state.outer).detach(),
            transform=task.data.transform,
            class_names=task.data.class_names,
            provenance={
                **task.provenance,
                **learned,
                **coded,
                "outer_step": state.step,
                "seconds": state.seconds,
                **({"skipped_steps": state.skipped} if state.skipped else {}),
                **({"outer_rates": state.rates} if len(state.rates) > 1 else {}),
            },
            stored=kept,
            recipe=student_recipe(
                task.network,
                task.evaluator,
                images,
                task.data.num_classes,
                learned.get("learning_rate"),
                task.config,
            ),
        )


def begin(settings: Distiller, task: Task) -> Distillation:
    """A new distillation, or one that goes on from the checkpoint in the task's folder.

    Raises:
        ConfigurationError: The task and the settings do not fit each other.
        bilevel.ProcessError: Another process failed, or cannot read the checkpoint.
        DamagedFileError: The checkpoint cannot be used.
    """
    state = settings.initial_state(task)
    notes = restored(state, task)
    set_aside = bool(notes) and task.folder.find(CHECKPOINT) is not None
    notes += missed(state, task) + changed(state, task)
    state.circumstances = task.circumstances
    steps = gather(state.step)
    if len(set(steps)) > 1:
        raise bilevel.ProcessError(
            f"the processes would go on from outer steps {steps}: {task.folder.path} must be a "
            "folder that all of them can read"
        )
    if set_aside:
        # Only now have all processes looked at it.
        task.folder.write(CHECKPOINT, lambda path: path.replace(path.with_name(DAMAGED)))
    broadcast_(state.outer.values())
    if state.set_rates():
        notes.append(
            f"note: other outer learning rates after outer step {state.step}: {state.rates[-1]}"
        )
    return Distillation(settings, task, state, notes)


def outer_loop(run: Distillation) -> Iterator[Event]:
    """Distil, and tell what happens; in several processes the same is told in all.

    After every outer step, and before the first one, comes `Ready`: a run that is left there, and
    whose state is saved, goes on to the same bits.

    Raises:
        bilevel.NonFiniteError: Too many outer steps in a row had no finite hypergradient, or one
            made the set non-finite, and `back_off` allows no further attempt.
        bilevel.ProcessError: Another process failed or is gone.
    """
    settings, state = run.settings, run.state
    state.processes = world_size()
    yield from _validated_and_ready(run)
    while progress(settings, state) < 1:
        began, sentence = time.perf_counter(), None
        event: Event
        try:
            with side_by_side(settings.patience_seconds):
                event, sentence = outer_step(run)
            state.skipped_in_a_row = 0
        except bilevel.NonFiniteError as error:
            state.skipped += 1
            state.skipped_in_a_row += 1
            if state.skipped_in_a_row >= MOST_SKIPPED or run.half_done:
                yield _went_back(run, error)
                yield from _validated_and_ready(run)
                continue
            event, run.half_done = Skipped(state.step, str(error)), True
            state.step += 1
            state.seconds += time.perf_counter() - began
        sentence = _follow_the_first_process(state, sentence)
        yield event
        if sentence is not None:
            yield StageChanged(state.step, sentence)
        state.validation_due = bool(
            settings.validate_every and state.step % settings.validate_every == 0
        )
        yield from _validated_and_ready(run)
    yield Finished(state.step)


def _validated_and_ready(run: Distillation) -> Iterator[Event]:
    run.half_done, run.schedule = False, run.state.truncation.state_dict()
    if run.state.validation_due:
        yield Validating(run.state.step, expected_seconds(run))
        began = time.perf_counter()
        validated = validate(run)
        run.validation_seconds = time.perf_counter() - began
        run.state.validation_due = False
        yield validated
    yield Ready(run.state.step)


def _went_back(run: Distillation, error: bilevel.NonFiniteError) -> WentBack:
    """Go back to the last checkpoint with half the rates, if the settings allow it once more."""
    settings, state, folder = run.settings, run.state, run.task.folder
    checkpoint = folder.find(CHECKPOINT)
    rate_scale = state.rate_scale / 2
    if checkpoint is None or rate_scale < 0.5**settings.back_off:
        raise error
    skipped, seconds, given_up = state.skipped, state.seconds, state.step
    state.restore(checkpoint)
    state.skipped, state.seconds, state.rate_scale = skipped, seconds, rate_scale
    state.skipped_in_a_row = 0
    state.set_rates()
    rates = {name: rate for name, rate in state.rates[-1].items() if name in state.outer}
    return WentBack(state.step, given_up, rates)


def outer_step(run: Distillation) -> tuple[Stepped, str | None]:
    """One outer step; if it raises, the outer variables are as they were, unless `run.half_done`.

    Returns:
        What was done, and a sentence if the truncation schedule changes its course.

    Raises:
        bilevel.NonFiniteError: The hypergradient, or what it makes of the set, is not finite.
    """
    began = time.perf_counter()
    settings, task, state = run.settings, run.task, run.state

    state.optimizer.zero_grad()
    stage = state.truncation.stage
    constants, outer_batch = run.objective.inputs(state.step, stage)
    generator = run.key.generator("outer", state.step)
    result = run.averaged.backward({**state.outer, **constants}, outer_batch, generator)
    differentiated, run.half_done = time.perf_counter(), True
    stored = task.synthetic.stored(state.outer)
    clip_bound = None if state.clip is None else state.clip(stored.values())[1]
    state.optimizer.step()
    task.synthetic.constrain_(state.outer)
    if state.average is not None and settings.average_decay is not None:
        for name, average in state.average.items():
            average.lerp_(stored[name].detach(), 1 - settings.average_decay)
    state.check_finite()

    updated = time.perf_counter()
    metrics = {name: float(value) for name, value in result.metrics.items()}
    if HELD_OUT in state.truncation.metrics:
        metrics[HELD_OUT] = run.objective.held_out_accuracy(result.params)
    seconds = time.perf_counter() - began
    state.step += 1
    state.seconds += seconds
    told = {"loss": float(result.loss), **metrics, "progress": progress(settings, state)}
    sentence = state.truncation.update(told)
    signals = {name: value for name, value in result.trace.items() if name != "inner_loss"}
    stepped = Stepped(
        step=state.step,
        seconds=seconds,
        result=result,
        clip_bound=clip_bound,
        metrics=metrics,
        objective=run.objective.report(result),
        schedule={**state.truncation.report(), **signals},
        parts={
            "hypergradient": differentiated - began,
            **result.stats.seconds,
            "outer_update": updated - differentiated,
        },
        stage=stage,
    )
    return stepped, sentence


def progress(settings: Distiller, state: TrainingState) -> float:
    """What is done of a run, by steps or by time, whichever is further; at least 1 is all."""
    by_time = 0.0 if settings.minutes is None else state.seconds / (60 * settings.minutes)
    return max(state.step / settings.outer_steps, by_time)


def _follow_the_first_process(state: TrainingState, sentence: str | None) -> str | None:
    """Take over the first process's clock, its schedule's state, and what that has to say."""
    schedule: dict[str, Any] = to_device(state.truncation.state_dict(), torch.device("cpu"))
    state.seconds, schedule, sentence = from_first_process((state.seconds, schedule, sentence))
    if not is_first_process():
        state.truncation.load_state_dict(schedule)
    return sentence
