"""A recorded window, in another precision or on another device."""

from dataclasses import replace
from typing import Any

import torch

import bilevel
from bilevel.tree import detach


@torch.no_grad()
def run_again(
    inner: bilevel.InnerLoop, outer: Any, recorded: bilevel.Trajectory, start: bilevel.Iterate
) -> bilevel.Trajectory:
    """The window of a recording, run again from `start` by another inner loop, in its precision."""
    window, key = recorded.window, recorded.key
    begun = bilevel.record(inner, outer, key, steps=1)
    kept, losses = {window.start: start}, [torch.zeros((), device=start.params.device)]
    losses *= window.start
    for step in range(window.start, window.stop):
        inputs = inner.inputs(outer, step, key)
        params, state, _, scalars = inner.run(
            inner.advance, start.params, start.state, detach(inputs), ()
        )
        kept[step + 1] = start = bilevel.Iterate(params, state)
        losses.append(scalars["inner_loss"])
    trace = bilevel.Trace({"inner_loss": torch.stack([x.to(losses[-1]) for x in losses])})
    return replace(begun, steps=recorded.steps, kept=kept, trace=trace, window=window)
