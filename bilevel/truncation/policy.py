"""Backpropagation through a window that a policy over inner steps chooses."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from bilevel.checks import check_choice, check_integer, check_number
from bilevel.errors import ConfigurationError
from bilevel.recording.trajectory import Trace
from bilevel.truncation.base import Truncation
from bilevel.truncation.selection import Selection
from bilevel.truncation.signals import changes, gradient_norms, standardize
from bilevel.window import Plan, Window


@final
class WithinTrajectoryPolicy(Truncation):
    """AT-BPTT++: a policy over inner steps, moved a little by every run's gradient norms.

    With g_t = ‖∇_θ ℓ(θ_t)‖₂, Δ_t = |g_t − g_{t−1}|, Δ_0 = 0, hats for z-scores over the run and
    ḡ for the mean of g, on every outer step

        β     = 2(ḡ − ḡ_min)/(ḡ_max − ḡ_min) − 1     (1 at first), with running extremes of ḡ
        π     = softmax(log π_ref + β·ĝ/λ)            π_ref uniform at first
        π_ref ← (1 − ρ)·π_ref + ρ·π
        W*_t  = W − R + 2R·σ(Δ̂_t/τ_w), rounded
        t     ~ π,  the window's last step

    and the window is [t + 1 − W*, t + 1). Large gradients are preferred while ḡ is near its running
    maximum, small ones near its minimum; there are no stages.

    Args:
        window: W ≥ 1.
        width_range: R in [0, W).
        kl_weight: λ > 0, the weight of the divergence from π_ref; larger changes π less.
        reference_rate: ρ in (0, 1].
        width_temperature: τ_w > 0.
        partial_windows: What becomes of a window that would begin before the run, t + 1 < W*_t:
            "excluded", so that its t is not drawn; or "cut" to [0, t + 1), as released. Half of the
            windows may then soon begin at step 0, of a few steps each: see docs/truncation.md.

    Raises:
        ConfigurationError: An argument outside its range.

    Source: the released code of AT-BPTT++ (aether-hang/at-bptt-plus), within-trajectory policy
    optimisation. Its probe network is not needed: the norms are those of the run itself.
    """

    def __init__(
        self,
        window: int,
        width_range: int,
        kl_weight: float = 1.0,
        reference_rate: float = 0.05,
        width_temperature: float = 1.0,
        partial_windows: str = "excluded",
    ) -> None:
        self.window = check_integer("window", window)
        self.width_range = check_integer("width_range", width_range, minimum=0)
        if width_range >= window:
            raise ConfigurationError(f"width_range={width_range}: it must be below window={window}")
        self.kl_weight = check_number("kl_weight", kl_weight, above=0)
        self.reference_rate = check_number("reference_rate", reference_rate, above=0, maximum=1)
        self.width_temperature = check_number("width_temperature", width_temperature, above=0)
        self.partial_windows = check_choice("partial_windows", partial_windows, ("excluded", "cut"))
        self._reference = torch.empty(0, dtype=torch.float64)
        self._extremes = torch.empty(0, dtype=torch.float64)
        self._last_report: dict[str, float | Tensor] = {}

    @property
    def minimum_steps(self) -> int:
        return self.window + self.width_range

    def plan(self, steps: int, generator: torch.Generator) -> Plan:
        return Plan(steps, signals=("gradient_norm",))

    def select(self, trace: Trace, generator: torch.Generator) -> Window:
        norms = gradient_norms(trace)
        steps, mean = len(norms), norms.mean()
        if not len(self._reference):
            self._reference = torch.full_like(norms, 1 / steps)
            self._extremes = torch.stack([mean, mean])
        if len(self._reference) != steps:
            raise ConfigurationError(
                f"the policy is over runs of {len(self._reference)} inner steps; this one has "
                f"{steps}"
            )
        self._extremes = torch.stack(
            [torch.minimum(self._extremes[0], mean), torch.maximum(self._extremes[1], mean)]
        )
        lowest, highest = self._extremes.tolist()
        beta = 1.0 if highest == lowest else 2 * (float(mean) - lowest) / (highest - lowest) - 1
        # So that no step is ruled out for good.
        logits = self._reference.clamp_min(1e-8).log() + beta * standardize(norms) / self.kl_weight
        policy = torch.softmax(logits, dim=0)
        self._reference = self._reference.lerp(policy, self.reference_rate)
        selection = self._selection(logits, changes(norms))
        self._last_report = {"beta": beta, **selection.report()}
        return selection.draw(generator)

    def report(self) -> dict[str, float | Tensor]:
        return dict(self._last_report)

    def state_dict(self) -> dict[str, Tensor]:
        return {"reference": self._reference, "extremes": self._extremes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        reference, extremes = state.get("reference"), state.get("extremes")
        if (
            not isinstance(reference, Tensor)
            or not isinstance(extremes, Tensor)
            or reference.dim() != 1
            or extremes.shape != ((2,) if len(reference) else (0,))
        ):
            raise ConfigurationError(
                f"WithinTrajectoryPolicy cannot continue from {dict(state)}: it needs the tensors "
                "reference [T] and extremes [2]"
            )
        self._reference, self._extremes, self._last_report = reference, extremes, {}

    def _selection(self, logits: Tensor, change: Tensor) -> Selection:
        """Windows that end at any step, or only at those at which they are whole."""
        steps = len(logits)
        share = torch.sigmoid(standardize(change) / self.width_temperature)
        widths = (self.window + self.width_range * (2 * share - 1)).round().to(torch.int64)
        stops = torch.arange(1, steps + 1)
        starts = stops - widths
        if self.partial_windows == "cut":
            starts = starts.clamp_min(0)
        inside = starts >= 0
        policy = torch.softmax(logits[inside], dim=0)
        return Selection(policy, starts[inside], stops[inside], steps)
