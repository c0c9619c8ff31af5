"""Backpropagation through runs whose length is drawn log-uniformly."""

from typing import final

import torch

from bilevel.checks import check_integer
from bilevel.truncation.base import Truncation
from bilevel.window import Plan, Window


@final
class LogUniform(Truncation):
    """Runs of random length N, every order of magnitude as likely as the next.

        N = ⌊e^u⌋,  u uniform on [log a, log(T + 1))
        P(N = n) = log((n + 1)/n) / log((T + 1)/a),  n = a … T

    with a = `minimum`. The window is [0, N), or [N − W, N). No step past N is ever run, so a call
    costs about (T − a)/log(T/a) inner steps.

    Without `window` the hypergradient is unbiased for Σ_n P(n)·F(θ_n), an outer loss of its own in
    which short runs count most: right for what shall work at every length, such as a learned
    optimizer. As an estimate of dF(θ_T)/dφ it is biased towards short horizons; so is every N with
    a `window`, as with `Last`.

    Args:
        minimum: The shortest run, ≥ 1.
        window: W in [1, minimum], if only the last steps of a run are to be differentiated.

    Raises:
        ConfigurationError: An argument outside its range.

    Source: `LogUniformLengthSchedule` of google/learned_optimization, whose u ends at log T, so
    that a run of all T steps has probability 0.
    """

    def __init__(self, minimum: int, window: int | None = None) -> None:
        self.minimum = check_integer("minimum", minimum)
        self.window = (
            None if window is None else check_integer("window", window, maximum=self.minimum)
        )

    @property
    def minimum_steps(self) -> int:
        return self.minimum

    def plan(self, steps: int, generator: torch.Generator) -> Plan:
        uniform = float(torch.rand((), dtype=torch.float64, generator=generator))
        # Rounding may reach T + 1.
        stop = min(int(self.minimum * ((steps + 1) / self.minimum) ** uniform), steps)
        return Plan.of(Window(0 if self.window is None else stop - self.window, stop))
