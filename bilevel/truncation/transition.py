"""When a stage-aware schedule goes on to its next stage."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from math import isfinite
from typing import Any, final

from bilevel.checks import check_choice, check_instance, check_integer, check_number
from bilevel.errors import ConfigurationError


class Stage(IntEnum):
    """The stages of an outer run, in order."""

    EARLY = 0
    MIDDLE = 1
    LATE = 2


class Transition(ABC):
    """Decides when an outer run goes from early to middle to late. It never goes back.

    Like a schedule, it fixes its configuration when it is made and changes only its state.

    Attributes:
        metrics: Names of the metrics that `update` reads.
    """

    metrics: Sequence[str] = ()

    @property
    @abstractmethod
    def stage(self) -> Stage:
        """The stage of the next outer step."""

    @abstractmethod
    def update(self, metrics: Mapping[str, float]) -> str | None:
        """Learn of an outer step's metrics.

        Returns:
            A sentence with the numbers that ended a stage, or None.

        Raises:
            ConfigurationError: A metric that it reads is missing or not finite.
        """

    @abstractmethod
    def report(self) -> dict[str, float]:
        """Numbers to watch."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The state to save, of plain numbers."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state.

        Raises:
            ConfigurationError: Another kind of transition saved it.
        """


def read_metric(metrics: Mapping[str, float], name: str) -> float:
    """A metric that a schedule asks for, checked."""
    if name not in metrics:
        raise ConfigurationError(
            f"update was not given the metric {name!r}; it was given {sorted(metrics)}"
        )
    value = float(metrics[name])
    if not isfinite(value):
        raise ConfigurationError(f"the metric {name!r} is {value}; it must be finite")
    return value


@final
class ByFraction(Transition):
    """The middle and the late stage begin at given fractions of the outer run.

    Reads the metric `progress`, the fraction of the outer run that is done. Use it for short runs,
    in which noise hides a plateau, and for runs that must be comparable step by step.

    Args:
        middle: Where the middle stage begins, in [0, 1].
        late: Where the late stage begins, in [middle, 1].

    Raises:
        ConfigurationError: An argument outside its range.

    The default thirds are a plain choice; nothing of the kind is published.
    """

    metrics = ("progress",)

    def __init__(self, middle: float = 1 / 3, late: float = 2 / 3) -> None:
        self.middle = check_number("middle", middle, minimum=0, maximum=1)
        self.late = check_number("late", late, minimum=self.middle, maximum=1)
        self._progress = 0.0

    @property
    def stage(self) -> Stage:
        return Stage((self._progress >= self.middle) + (self._progress >= self.late))

    def update(self, metrics: Mapping[str, float]) -> str | None:
        before = self.stage
        # A run that is made longer has done less of itself, but does not go back.
        self._progress = max(self._progress, read_metric(metrics, "progress"))
        if self.stage == before:
            return None
        return (
            f"the {before.name.lower()} stage ends and the {self.stage.name.lower()} stage begins "
            f"at {100 * self._progress:.1f} % of the outer run"
        )

    def report(self) -> dict[str, float]:
        return {"stage": int(self.stage)}

    def state_dict(self) -> dict[str, float]:
        return {"progress": self._progress}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != {"progress"} or not isinstance(state["progress"], (int, float)):
            raise ConfigurationError(
                f"ByFraction has a number `progress` as state, not {dict(state)}"
            )
        self._progress = float(state["progress"])


@dataclass
class _State:
    """`total` and `count` are of the block under way; `mean` and `gain` of the last one."""

    stage: int = 0
    total: float = 0.0
    count: int = 0
    stalled: int = 0
    reference: float | None = None
    mean: float | None = None
    gain: float | None = None


@final
class ByMetric(Transition):
    """A stage ends when a metric has gained too little for too long.

    The metric is averaged over blocks of outer steps. A block's gain is by how much its mean is
    better than a reference; the stage ends after `patience` blocks in a row whose gain stayed below
    `gain`. The reference is the stage's first block, then the last block that reached the gain: so
    a stage goes on while it earns `gain` in every `patience` blocks.

    Args:
        metric: The name under which `update` is given it. A held-out one tells progress from
            fitting the outer batches.
        gain: (early, middle): the gains that keep these stages going, in units of the metric.
        patience: (early, middle): for how many blocks in a row they may be missed.
        block: Outer steps that are averaged, to be heard above the noise of a single one.
        reference: "best", as above; or "previous": the block before, as the paper's wording and
            its released code have it. Over thousands of blocks a gain per block is noise, so it is
            the noise that then sets the length of a stage.
        better: "larger" or "smaller". Default: "smaller" for the metric `loss`, else "larger".

    Raises:
        ConfigurationError: An argument outside its range.

    Source: AT-BPTT (arXiv 2510.04838), threshold-guided stage transition. Its thresholds are 1.5
    points for 5 % of all epochs, then unpublished ones. The defaults are those of the released
    code for T = 200 (there on the accuracy of the augmented outer batches, with "previous").
    """

    def __init__(
        self,
        metric: str = "held_out_accuracy",
        gain: Sequence[float] = (0.015, 0.010),
        patience: Sequence[int] = (30, 25),
        block: int = 10,
        reference: str = "best",
        better: str | None = None,
    ) -> None:
        for name, value in (("gain", gain), ("patience", patience)):
            if not isinstance(value, (tuple, list)) or len(value) != 2:
                raise ConfigurationError(f"{name}={value!r}: it must be a pair (early, middle)")
        self.metric = check_instance("metric", metric, str, "'held_out_accuracy'")
        self.metrics = (metric,)
        self.gain = tuple(check_number("gain", value, above=0) for value in gain)
        self.patience = tuple(check_integer("patience", value) for value in patience)
        self.block = check_integer("block", block)
        if better is None:
            better = "smaller" if metric == "loss" else "larger"
        self.better = check_choice("better", better, ("larger", "smaller"))
        self.reference = check_choice("reference", reference, ("best", "previous"))
        self._state = _State()

    @property
    def stage(self) -> Stage:
        return Stage(self._state.stage)

    def update(self, metrics: Mapping[str, float]) -> str | None:
        state = self._state
        state.total += read_metric(metrics, self.metric)
        state.count += 1
        if state.count < self.block:
            return None
        mean, reference = state.total / self.block, state.reference
        state.mean, state.total, state.count = mean, 0.0, 0
        if self.stage == Stage.LATE:
            return None
        if reference is None:
            state.reference = mean
            return None
        wanted, patience = self.gain[self.stage], self.patience[self.stage]
        state.gain = mean - reference if self.better == "larger" else reference - mean
        state.stalled = 0 if state.gain >= wanted else state.stalled + 1
        if state.gain >= wanted or self.reference == "previous":
            state.reference = mean
        if state.stalled < patience:
            return None
        self._state = _State(stage=state.stage + 1, mean=mean)
        return (
            f"the {Stage(state.stage).name.lower()} stage ends and the {self.stage.name.lower()} "
            f"stage begins: for {patience} blocks of {self.block} outer steps {self.metric} has "
            f"gained less than {wanted:g}; it is {mean:.4f}, {mean - reference:+.4f} against "
            f"{reference:.4f}"
        )

    def report(self) -> dict[str, float]:
        numbers: dict[str, float] = {"stage": self._state.stage}
        if self._state.mean is not None:
            numbers["metric"] = self._state.mean
        if self._state.gain is not None:
            numbers["gain"] = self._state.gain
        if self.stage != Stage.LATE:
            numbers["gain_wanted"] = self.gain[self.stage]
            numbers["blocks_without_gain"] = self._state.stalled
            numbers["patience"] = self.patience[self.stage]
        return numbers

    def state_dict(self) -> dict[str, float | None]:
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        try:
            found = _State(**state)
            possible = (
                found.stage in list(Stage)
                and 0 <= found.count < self.block
                and found.stalled >= 0
                and isfinite(found.total)
                and all(
                    value is None or isfinite(value)
                    for value in (found.reference, found.mean, found.gain)
                )
            )
        except TypeError:
            possible = False
        if not possible:
            raise ConfigurationError(
                f"ByMetric(block={self.block}) cannot continue from {dict(state)}: it needs "
                f"{sorted(asdict(_State()))}, with a stage in 0 … 2 and a count below block"
            )
        self._state = found
