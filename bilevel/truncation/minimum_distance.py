"""Backpropagation up to the step that came nearest to a target."""

from typing import Literal, final

import torch

from bilevel.checks import check_choice, check_integer
from bilevel.recording.trajectory import Trace
from bilevel.truncation.base import Truncation
from bilevel.window import Plan, Window

#: The signal that a problem has to record for each choice of distance.
SIGNALS = {"l1": "l1_distance", "squared_l2": "squared_l2_distance"}


@final
class MinimumDistance(Truncation):
    """ATT: window [0, N), where θ_N is the iterate nearest to a target.

        N = argmin_{minimum ≤ t ≤ T} distance(θ_t, target)

    Of equally near iterates the later one is taken, since it uses more of the outer variables. A
    distance that is NaN counts as infinite. The problem has to supply the distance as a signal,
    named `l1_distance` or `squared_l2_distance`, whose entry t − 1 is that of θ_t.

    Args:
        distance: "l1", Σᵢ|θᵢ − θ*ᵢ|, as the released code has it; or "squared_l2", as the paper.
        minimum: The least window, ≥ 1: against collapsing to a few steps.

    Raises:
        ConfigurationError: An argument outside its range.

    How the window depends on the outer variables is not differentiated. With an outer loss that is
    a function of the same distance nothing is lost: where the minimum is unique, the result is the
    gradient of the loss at the minimum over t.

    Source: Liu et al., "Dataset Distillation by Automatic Training Trajectories", ECCV 2024, arXiv
    2407.14245.
    """

    def __init__(self, distance: Literal["l1", "squared_l2"] = "l1", minimum: int = 1) -> None:
        self.distance = check_choice("distance", distance, tuple(SIGNALS))
        self.minimum = check_integer("minimum", minimum)

    @property
    def minimum_steps(self) -> int:
        return self.minimum

    def plan(self, steps: int, generator: torch.Generator) -> Plan:
        return Plan(steps, signals=(SIGNALS[self.distance],))

    def select(self, trace: Trace, generator: torch.Generator) -> Window:
        distances = trace[SIGNALS[self.distance]][self.minimum - 1 :]
        distances = torch.where(distances.isnan(), torch.inf, distances)
        nearest = (distances == distances.min()).nonzero().max()
        return Window(0, self.minimum + int(nearest))
