"""What happens in a distillation, as the outer loop tells it."""

from dataclasses import dataclass, field
from typing import final

from torch import Tensor

import bilevel
from bilevel.truncation import Stage


@final
@dataclass(frozen=True)
class Ready:
    """Nothing is half done after this many outer steps: save here, and stop here."""

    step: int


@final
@dataclass(frozen=True)
class Stepped:
    """An outer step was made.

    Attributes:
        step: Outer steps done.
        seconds: How long it took.
        result: Its hypergradient, averaged over processes.
        clip_bound: The norm that the images' hypergradient was clipped to; None without clipping.
        metrics: What the schedule was told beside the loss.
        objective: What the objective reports.
        schedule: What the schedule reports and looked at: numbers, and profiles over inner steps.
        parts: The seconds by what was done.
        stage: Of the schedule, if it has stages.
    """

    step: int
    seconds: float
    result: bilevel.HypergradientResult
    clip_bound: float | None
    metrics: dict[str, float]
    objective: dict[str, float]
    schedule: dict[str, Tensor | float]
    parts: dict[str, float] = field(default_factory=dict)
    stage: Stage | None = None


@final
@dataclass(frozen=True)
class Skipped:
    """An outer step was left out, for its hypergradient was not finite."""

    step: int
    reason: str


@final
@dataclass(frozen=True)
class WentBack:
    """After too many skipped steps the state is that of the last checkpoint, with lower rates.

    Attributes:
        step: Outer steps that its state has done.
        given_up: The step that the run had come to.
        rates: The outer learning rates from now on.
    """

    step: int
    given_up: int
    rates: dict[str, float]


@final
@dataclass(frozen=True)
class StageChanged:
    """The truncation schedule changes its course."""

    step: int
    sentence: str


@final
@dataclass(frozen=True)
class Validating:
    """The set will now be judged on the validation split: a run may stop here, and does it later.

    Attributes:
        step: Outer steps done.
        seconds: About how long it takes.
    """

    step: int
    seconds: float


@final
@dataclass(frozen=True)
class Validated:
    """The set was judged on the validation split.

    Attributes:
        step: Outer steps done.
        accuracy: Fractions, of networks trained on the set with the `images` as they are, and, if
            there is one, with their `average`.
        best: The one of these that is better than all before; None if neither is.
    """

    step: int
    accuracy: dict[str, float]
    best: str | None


@final
@dataclass(frozen=True)
class Finished:
    """All that was asked for is done."""

    step: int


Event = Ready | Stepped | Skipped | WentBack | StageChanged | Validating | Validated | Finished
