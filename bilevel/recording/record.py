"""Recording an inner run: the rollout, and how much of its graph is kept."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel.checks import check_scalar
from bilevel.errors import ConfigurationError
from bilevel.random import Key
from bilevel.recording.inner import SIGNALS, InnerLoop
from bilevel.recording.outer_gradient import MicroBatches
from bilevel.recording.rollout import OUTER_LOSS, Rollout
from bilevel.recording.short_run import MOST_STEPS, ShortRun
from bilevel.recording.trajectory import Trace, Trajectory
from bilevel.recording.unrolled import GraphBudget, KeptGraphs, Unrolled
from bilevel.tree import detach, tensors_in
from bilevel.variables import Iterate, OuterVariables
from bilevel.window import Window

if TYPE_CHECKING:
    from bilevel.first_call import FirstCall


@torch.no_grad()
def record(
    inner: InnerLoop,
    outer: Any,
    key: Key,
    *,
    steps: int,
    horizon: int | None = None,
    signals: Sequence[str] = (),
    outer_batch: Any = None,
    keep_from: int = 0,
    keep_every: int | None = None,
    keep_on: torch.device | None = None,
    keep_gradients: bool = False,
    budget: GraphBudget | None = None,
    window: Window | None = None,
    first_call: FirstCall | None = None,
) -> Trajectory:
    """Run `horizon` inner steps and record them.

    Args:
        inner: The inner loop.
        outer: The outer variables, which are copied.
        key: The randomness of this run.
        steps: The length T of a full run.
        horizon: How many steps to run, 1 … `steps`; default: all of them.
        signals: Names of per-step scalars to record beside `inner_loss`: of `SIGNALS`, of those
            that the problem supplies, or "outer_loss", F at θ_{t+1}.
        outer_batch: The batch of that outer loss.
        keep_from: The first iterate that a window may start from.
        keep_every: Keep every k-th iterate from there on; the others are recomputed. Default:
            `affordable_spacing`.
        keep_on: Device that holds the kept iterates; default: where they are.
        keep_gradients: Whether kept iterates have their inner gradient with them.
        budget: Of the graphs that are kept: of the whole window, if it is known and fits; else of
            what each step takes of φ, if that fits. Default: none are, and the trajectory can be
            differentiated more than once.
        window: The window, where it is known before the run.
        first_call: Checks what the methods of the problem return, and the first step.

    Raises:
        ConfigurationError: A signal that nothing supplies.
        ProblemError: `init` returned no parameters, or the inner loss is no scalar.
    """
    horizon = steps if horizon is None else horizon
    budget = GraphBudget(0) if budget is None else budget
    variables = OuterVariables(outer)
    constants = detach(variables.tree)
    with torch.enable_grad():
        hyperparameters = inner.hyperparameters(variables.tree, 0)
        first = inner.start(variables.tree, key, hyperparameters)
    if first_call is not None:
        first_call.begin(variables, key, first, hyperparameters)
    iterate = first.detached()
    step_signals = tuple(name for name in signals if name != OUTER_LOSS)
    of_problem = set(step_signals) - set(SIGNALS)
    if OUTER_LOSS in signals and not inner.has_outer_loss:
        raise ConfigurationError(
            f"signal {OUTER_LOSS!r}: {type(inner.problem).__name__} has no outer_loss"
        )
    if of_problem:
        _check_signals(inner, of_problem, iterate.params, constants)
    if keep_every is None:
        one = replace(iterate, gradient=iterate.params) if keep_gradients else iterate
        keep_every = affordable_spacing(one, horizon - keep_from, keep_on)
    whole = KeptGraphs(budget, "step", 0 if window is None else window.width)
    is_short = window == Window(0, horizon) and horizon <= MOST_STEPS and horizon == steps
    if inner.compiler is not None and (
        not is_short or inner.has_step_loss or isinstance(outer_batch, MicroBatches)
    ):
        whole.refuse("the steps are compiled")
    if signals or keep_gradients:
        whole.refuse("signals or gradients of every step are recorded")
    rollout = Rollout(
        inner=inner,
        variables=variables,
        constants=constants,
        key=key,
        horizon=horizon,
        signals=signals,
        outer_batch=outer_batch,
        keep_from=keep_from,
        keep_every=keep_every,
        keep_on=keep_on,
        keep_gradients=keep_gradients,
        parts=KeptGraphs(budget, "inputs", horizon - keep_from),
        first_call=first_call,
    )
    unrolled: Unrolled | None = None
    short: ShortRun | None = None
    if inner.compiler is not None:
        short = rollout.run_compiled(iterate, whole)
    else:
        unrolled = rollout.run(iterate, first, whole, window)
    trajectory = Trajectory(
        inner=inner,
        variables=variables,
        key=key,
        steps=steps,
        first=first,
        kept=rollout.kept,
        inputs=rollout.inputs,
        blocks=tuple(rollout.blocks),
        unrolled=unrolled,
        short_run=short,
        trace=Trace({name: torch.cat(values) for name, values in rollout.scalars.items()}),
        window=Window(min(keep_from, horizon - 1), horizon),
        no_graph=whole.refusal if window is not None else "",
    )
    if first_call is not None:
        first_call.finish(trajectory if window is None else trajectory.select(window))
    return trajectory


def affordable_spacing(iterate: Iterate, count: int, kept_on: torch.device | None = None) -> int:
    """The smallest k such that keeping every k-th of `count` iterates is cheap where they are kept.

    Cheap is 96 MiB on a CPU and 1/64 of an accelerator's memory, for the ⌈count / k⌉ kept ones and
    the k of a recomputed segment; for what an accelerator keeps in the host's memory, a quarter of
    that, if its size is known. Where nothing is, k = ⌈√count⌉, which takes the least memory.
    """
    leaves = tensors_in((iterate.params, iterate.gradient, iterate.state))
    size = sum(leaf.nbytes for leaf in leaves)
    device = iterate.params.device
    budget = 96 * 2**20
    if device.type == "cuda":
        budget = torch.cuda.get_device_properties(device).total_memory // 64
    if kept_on is not None and kept_on.type == "cpu" and device.type != "cpu":
        budget = _host_memory() // 4 or budget
    least = max(1, math.ceil(math.sqrt(count)))
    for spacing in range(1, least):
        segment = spacing if spacing > 1 else 0
        if (math.ceil(count / spacing) + segment) * size <= budget:
            return spacing
    return least


def _host_memory() -> int:
    """Bytes of memory in this machine; 0 where it cannot be asked for."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # noqa: TID251
    except (AttributeError, ValueError, OSError):  # Windows has no such call.
        return 0


def _check_signals(inner: InnerLoop, names: set[str], params: Tensor, outer: Any) -> None:
    """Raise unless the problem supplies a scalar for every name."""
    with torch.enable_grad():
        supplied = inner.problem.signals(inner.unravel(params), outer)
    unknown = names - set(supplied)
    if unknown:
        raise ConfigurationError(
            f"unknown signals {sorted(unknown)}; known: {sorted({*SIGNALS, OUTER_LOSS, *supplied})}"
        )
    for name in sorted(names):
        check_scalar(supplied[name], f"signals()[{name!r}]")
