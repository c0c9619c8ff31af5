"""Recorded signals, checked before a schedule chooses by them."""

import torch
from torch import Tensor

from bilevel.errors import NonFiniteError
from bilevel.trajectory import Trace


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
