"""What schedules read from a recording: signals, and norms of the inner gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.errors import NonFiniteError
from bilevel.recording.trajectory import Trace


def finite_signal(trace: Trace, name: str, what: str, advice: str) -> Tensor:
    """The signal `name`, float64 [horizon] on the CPU.

    Args:
        trace: The recorded run.
        name: As the plan asked for it.
        what: It in words, for the error.
        advice: What to look at, for the error.

    Raises:
        NonFiniteError: An entry is NaN or infinite.
    """
    values = trace[name].to("cpu", torch.float64)
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        step = int(bad[0])
        raise NonFiniteError(
            f"{what} became {float(values[step])} at inner step {step} of {trace.horizon}: lower "
            f"the inner learning rate or {advice}"
        )
    return values


def gradient_norms(trace: Trace) -> Tensor:
    """g_t = ‖∇_θ ℓ(θ_t)‖₂, float64 [horizon] on the CPU.

    Raises:
        NonFiniteError: One is NaN or infinite.
    """
    return finite_signal(
        trace, "gradient_norm", "the norm of the inner gradient", "look at the inner batch"
    )


def changes(norms: Tensor) -> Tensor:
    """Δ_t = |g_t − g_{t−1}| with Δ_0 = 0; shape [T]."""
    return torch.diff(norms, prepend=norms[:1]).abs()


def standardize(values: Tensor) -> Tensor:
    """(v − mean)/standard deviation; zeros where all values are equal."""
    centred = values - values.mean()
    deviation = values.std(correction=0)
    # Below this, the deviation is rounding of the mean, not of the values.
    if deviation <= 1e-12 * values.abs().max():
        return torch.zeros_like(values)
    return centred / deviation


def log_standardize(values: Tensor) -> Tensor:
    """The standardised logarithm of values ≥ 0. A zero counts as the least value above it."""
    positive = values[values > 0]
    if not len(positive):
        return torch.zeros_like(values)
    return standardize(values.clamp_min(positive.min()).log())


def rank(values: Tensor) -> Tensor:
    """Ranks scaled to [0, 1], equal values sharing their mean rank; shape [T]."""
    if len(values) == 1:
        return torch.full_like(values, 0.5)
    ordered = values.sort().values
    first = torch.searchsorted(ordered, values)
    last = torch.searchsorted(ordered, values, right=True) - 1
    return (first + last) / (2 * (len(values) - 1))


#: How a signal is put on a common scale, by the name that users give.
NORMALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda values: values,
    "standardize": standardize,
    "log_standardize": log_standardize,
}
