"""Stages of a given length."""

from collections.abc import Mapping
from typing import Any, final

from bilevel.checks import check_number
from bilevel.errors import ConfigurationError
from bilevel.truncation.transition import Stage, Transition, read_metric


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
