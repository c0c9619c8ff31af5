"""Backpropagation up to the step with the largest outer loss."""

from typing import final

import torch

from bilevel.checks import check_integer
from bilevel.recording.trajectory import Trace
from bilevel.truncation.base import Truncation
from bilevel.truncation.signals import finite_signal
from bilevel.window import Plan, Window


@final
class Pessimistic(Truncation):
    """PTT: window [0, K), where θ_K is the iterate with the largest outer loss.

        K = argmax_{minimum ≤ k ≤ T} F(θ_k, φ)

    Of equally large ones the later is taken, since it uses more of the outer variables. F is
    evaluated after every inner step, on the whole outer batch and without a graph: T evaluations a
    call beside the run itself. Losses along the run (`Problem.step_loss`) do not count.

    Where the largest is unique, the result is the gradient of max_k F(θ_k(φ), φ). It is no estimate
    of dF(θ_T)/dφ: what is minimised is a bound that F(θ_T) stays below. Meant for inner losses with
    many minima, of which a run may find a bad one. Where F falls from the first step on, as in
    training from scratch, K is `minimum`, and all that φ does later goes unseen.

    Args:
        minimum: The least window, ≥ 1.

    Raises:
        ConfigurationError: `minimum` is no such integer; in a call, a problem without `outer_loss`.
        NonFiniteError: (in a call) An outer loss is NaN or infinite.

    Source: Liu, Liu, Zeng and Zhang, NeurIPS 2021, arXiv 2110.00455, pessimistic trajectory
    truncation. The other half of that method, a start that is learned, is a `Problem.init` that
    returns outer variables.
    """

    def __init__(self, minimum: int = 1) -> None:
        self.minimum = check_integer("minimum", minimum)

    @property
    def minimum_steps(self) -> int:
        return self.minimum

    def plan(self, steps: int, generator: torch.Generator) -> Plan:
        return Plan(steps, signals=("outer_loss",))

    def select(self, trace: Trace, generator: torch.Generator) -> Window:
        losses = finite_signal(
            trace, "outer_loss", "the outer loss", "look at outer_loss and its batch"
        )[self.minimum - 1 :]
        largest = (losses == losses.max()).nonzero().max()
        return Window(0, self.minimum + int(largest))
