"""Stages that end when a metric stalls."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, final

from bilevel.checks import check_choice, check_instance, check_integer, check_number
from bilevel.errors import ConfigurationError
from bilevel.truncation.transition import Stage, Transition, read_metric


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
