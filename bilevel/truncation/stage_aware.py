"""Backpropagation through a window that follows the inner gradient norms, by stage."""

import copy
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from bilevel.checks import check_choice, check_instance, check_integer
from bilevel.errors import ConfigurationError
from bilevel.recording.trajectory import Trace
from bilevel.truncation.base import Truncation
from bilevel.truncation.distribution import Softmax, StepDistribution
from bilevel.truncation.selection import Selection
from bilevel.truncation.signals import changes, gradient_norms, rank
from bilevel.truncation.transition import Stage, Transition
from bilevel.window import Plan, Window


@final
class StageAware(Truncation):
    """AT-BPTT: where the window lies, and how wide it is, follow the recorded gradient norms.

    With g_t = ‖∇_θ ℓ(θ_t)‖₂, x_t the normalised g_t, Δ_t = |g_t − g_{t−1}|, Δ_0 = 0, W = `window`
    and d = `width_range`, an inner step t is drawn, with `anchor` "start" the window's first:

        early   p(t) ∝ exp(x_t/τ)     width W* = W − d + 2d·η_t
        middle  p(t) uniform          width W
        late    p(t) ∝ exp(−x_t/τ)    width W* = W − d + 2d·η_t

    over those t whose window lies inside [0, T). η_t ∈ [0, 1] grows with Δ_t. The norms are those
    of the run that is then differentiated, so they cost nothing but the steps after the window,
    which are run too. The middle stage needs no norms and runs no step past the window.

    Args:
        window: W ≥ 1, the base width. It is never changed.
        width_range: d in [0, W), so that widths lie in [W − d, W + d].
        transition: When the stages change: `ByMetric` or `ByFraction`. It is copied. Whoever runs
            the outer loop must call `update` after each outer step.
        distribution: What turns norms into p(t); default `Softmax()`, on the standardised log g.
        position: "paper", as above; or "mirrored", the late draw of the released code: the early
            window [start, stop) read from the end, [T − stop, T − start).
        width: "rank", η_t = rank of Δ_t, scaled to [0, 1]: all widths are used, W on average.
            "exp", the paper's η_t ∝ exp(Δ_t/τ), through `distribution` and scaled to a maximum of
            1: windows are then narrower than W on average, as few Δ_t are near the largest.
            "stage", the released code's: ranks early, W + d in the middle, W − d late.
        anchor: Whether t is the "start" of the window (as released) or its "end", its last step.
        refresh: For how many outer steps one recording serves. While it does, windows are drawn
            from its distribution before the run, which then stops at the window's end.

    Raises:
        ConfigurationError: An argument outside its range.

    The hypergradient is exact for its window; as an estimate of the full one it is biased, as
    with every truncation. See docs/papers.md for where the paper and its code differ.

    Source: Li et al., arXiv 2510.04838 (NeurIPS 2025), and its released code.
    """

    def __init__(
        self,
        window: int,
        width_range: int,
        transition: Transition,
        distribution: StepDistribution | None = None,
        position: str = "paper",
        width: str = "rank",
        anchor: str = "start",
        refresh: int = 1,
    ) -> None:
        self.window = check_integer("window", window)
        self.width_range = check_integer("width_range", width_range, minimum=0)
        if width_range >= window:
            raise ConfigurationError(
                f"width_range={width_range}: it must be below window={window}, or there would be "
                "windows of width 0"
            )
        check_instance("transition", transition, Transition, "bilevel.truncation.ByMetric()")
        distribution = Softmax() if distribution is None else distribution
        self.distribution = check_instance(
            "distribution", distribution, StepDistribution, "bilevel.truncation.Softmax()"
        )
        self.position = check_choice("position", position, ("paper", "mirrored"))
        self.width = check_choice("width", width, ("rank", "exp", "stage"))
        self.anchor = check_choice("anchor", anchor, ("start", "end"))
        self.refresh = check_integer("refresh", refresh)
        self.metrics = transition.metrics
        self._transition = copy.deepcopy(transition)
        self._selection: Selection | None = None
        self._uses_left = 0

    @property
    def stage(self) -> Stage:
        """The stage of the next outer step."""
        return self._transition.stage

    @property
    def minimum_steps(self) -> int:
        return self.window + self.width_range

    def plan(self, steps: int, generator: torch.Generator) -> Plan:
        if self.stage == Stage.MIDDLE:
            width = self.window + (self.width_range if self.width == "stage" else 0)
            self._selection = Selection.uniform(width, steps)
        elif self._uses_left and self._selection is not None and self._selection.steps == steps:
            self._uses_left -= 1
        else:
            self._selection = None
            return Plan(steps, signals=("gradient_norm",))
        return Plan.of(self._selection.draw(generator))

    def select(self, trace: Trace, generator: torch.Generator) -> Window:
        self._selection = self._selection_from_norms(gradient_norms(trace))
        self._uses_left = self.refresh - 1
        return self._selection.draw(generator)

    def update(self, metrics: Mapping[str, float]) -> str | None:
        before = self.stage
        sentence = self._transition.update(metrics)
        if self.stage != before:
            self._uses_left = 0
        return sentence

    def report(self) -> dict[str, float | Tensor]:
        selection = {} if self._selection is None else self._selection.report()
        return {**self._transition.report(), **selection}

    def state_dict(self) -> dict[str, Any]:
        selection = {} if self._selection is None else self._selection.state_dict()
        return {
            "uses_left": self._uses_left,
            **{f"transition.{name}": x for name, x in self._transition.state_dict().items()},
            **{f"selection.{name}": x for name, x in selection.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        def group(prefix: str) -> dict[str, Any]:
            return {
                name.removeprefix(prefix): value
                for name, value in state.items()
                if name.startswith(prefix)
            }

        uses_left, selection = state.get("uses_left"), group("selection.")
        if not isinstance(uses_left, int) or not 0 <= uses_left < self.refresh:
            raise ConfigurationError(
                f"StageAware(refresh={self.refresh}) cannot continue from a state with uses_left="
                f"{uses_left!r}: it must be an integer in [0, refresh)"
            )
        found = Selection.from_state(selection) if selection else None
        self._transition.load_state_dict(group("transition."))
        self._selection, self._uses_left = found, uses_left

    def _selection_from_norms(self, norms: Tensor) -> Selection:
        """The distribution over windows of the early or late stage."""
        late, steps = self.stage == Stage.LATE, len(norms)
        at, widths = torch.arange(steps), self._widths(changes(norms), late)
        starts = at if self.anchor == "start" else at + 1 - widths
        inside = (starts >= 0) & (starts + widths <= steps)
        sign = -1 if late and self.position == "paper" else 1
        probabilities = self.distribution(norms, inside, sign)[inside]
        selection = Selection(probabilities, starts[inside], (starts + widths)[inside], steps)
        return selection.mirrored() if late and self.position == "mirrored" else selection

    def _widths(self, change: Tensor, late: bool) -> Tensor:
        """W* for every t; int64 [T]."""
        if self.width == "exp":
            share = self.distribution(change, torch.ones_like(change, dtype=torch.bool))
            share = share / share.max()
        elif self.width == "stage" and late:
            share = torch.zeros_like(change)
        else:
            share = rank(change)
        widths = self.window + self.width_range * (2 * share - 1)
        return widths.round().to(torch.int64)
