"""A run of a few steps with its derivative as one compiled graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.recording.inner import InnerLoop
from bilevel.recording.unrolled import Unrolled
from bilevel.tree import detach, needs_gradient, partition
from bilevel.variables import Iterate, StepInputs

#: Of so many steps, at most: compiling takes longer with every one.
MOST_STEPS = 8


@dataclass(frozen=True)
class ShortRun:
    """What such a graph returns, all of it without a graph.

    Attributes:
        end: (θ_T, s_T).
        inner_losses: ℓ of every step, of shape [T].
        loss: F.
        metrics: What was reported beside it.
        cotangent: ∂F/∂θ_T.
        of_start: dF/dθ_0 and dF/ds_0, leaf by leaf.
        of_inputs: dF by every leaf of the inputs that requires a gradient, step after step.
        of_outer: ∂F/∂φ, leaf by leaf; None where F does not depend on it directly.
    """

    end: Iterate
    inner_losses: Tensor
    loss: Tensor
    metrics: dict[str, Tensor]
    cotangent: Tensor | None
    of_start: list[Tensor | None]
    of_inputs: list[Tensor | None]
    of_outer: list[Tensor | None]

    @classmethod
    def of(
        cls,
        inner: InnerLoop,
        start: Iterate,
        inputs: Sequence[StepInputs],
        outer: Any,
        outer_batch: Any,
    ) -> ShortRun:
        """The run from `start`, its outer loss, and all derivatives of that.

        Args:
            inner: The inner loop; it compiles.
            start: (θ_0, s_0).
            inputs: What every step takes of φ, on its graph.
            outer: φ for the outer loss, leaves that require a gradient.
            outer_batch: The batch of the outer loss.
        """
        params, state, *found = inner.run(
            _run, inner, start.params, start.state, list(inputs), outer, outer_batch
        )
        return cls(Iterate(params, state), *found)


def _run(
    inner: InnerLoop,
    params: Tensor,
    state: Any,
    inputs: list[StepInputs],
    outer: Any,
    outer_batch: Any,
) -> tuple[Any, ...]:
    leaves, rebuild = partition(state)
    at = [leaf.detach().requires_grad_() for leaf in (params, *leaves)]
    of_inputs = partition(inputs, needs_gradient)[0]
    of_outer = partition(outer, needs_gradient)[0]
    unrolled = Unrolled(inner, Iterate(at[0], rebuild(at[1:])), 0)
    inner_losses = torch.stack([unrolled.step(each) for each in inputs])
    with torch.enable_grad():
        end = unrolled.flat(len(inputs))
        loss, metrics = inner.outer_loss(end, outer, outer_batch)
    assert loss is not None, "problems with a step_loss come another way"
    wanted = [end, *at, *of_inputs, *of_outer]
    slopes: Sequence[Tensor | None] = [None] * len(wanted)
    if loss.requires_grad:
        slopes = torch.autograd.grad(loss, wanted, allow_unused=True)
    count = 1 + len(at)
    after = unrolled.iterate()
    return (
        after.params,
        after.state,
        inner_losses,
        loss.detach(),
        detach(metrics),
        slopes[0],
        list(slopes[1:count]),
        list(slopes[count : count + len(of_inputs)]),
        list(slopes[count + len(of_inputs) :]),
    )
