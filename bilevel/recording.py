"""Recording an inner run: the rollout, and how much of its graph is kept."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel.contract import check_scalar
from bilevel.errors import ConfigurationError
from bilevel.first_call import FirstCall
from bilevel.graph import saved_storages
from bilevel.inner import SIGNALS, InnerLoop, StepInputs
from bilevel.outer import OuterVariables, outer_loss_value
from bilevel.random import Key
from bilevel.trajectory import Iterate, Trace, Trajectory, Window
from bilevel.tree import detach, tensors_in

#: The per-step signal that takes the outer batch: F at θ_{t+1}.
OUTER_LOSS = "outer_loss"


@final
@dataclass
class GraphBudget:
    """How many bytes of autograd graph a recording may keep, and what one step's graph takes.

    What a step takes is measured once for each combination of shapes, on two steps that follow each
    other, and remembered. So what is kept depends on shapes and settings alone, never on the load
    of the machine: a run that is resumed goes the same way.

    Attributes:
        bytes: The most that may be kept; None: 256 MiB on a CPU, 1/64 of an accelerator's memory.
    """

    bytes: int | None = None
    _measured: dict[Hashable, int] = field(default_factory=dict)

    def limit(self, device: torch.device) -> int:
        """The budget in bytes for a run on `device`."""
        if self.bytes is not None:
            return self.bytes
        if device.type == "cuda":
            return torch.cuda.get_device_properties(device).total_memory // 64
        return 256 * 2**20

    def size(self, kind: str, signature: Hashable, count: int) -> int:
        """What `count` graphs of a kind that was measured take, in bytes."""
        return count * self._measured[kind, signature]

    def fits(self, kind: str, signature: Hashable, count: int, device: torch.device) -> bool | None:
        """Whether `count` graphs of this kind fit; None where one has not been measured yet."""
        if self.bytes == 0:
            return False
        measured = self._measured.get((kind, signature))
        return None if measured is None else count * measured <= self.limit(device)

    def measure(
        self, kind: str, signature: Hashable, before: Sequence[Tensor], after: Sequence[Tensor]
    ) -> None:
        """Remember what the graph of `after` keeps beyond that of the step before."""
        shared = saved_storages(before)
        self._measured[kind, signature] = sum(
            size for at, size in saved_storages(after).items() if at not in shared
        )


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
    examine = None if first_call is None else first_call.examine
    with torch.enable_grad(), inner.examined(examine, "init", "hyperparameters"):
        first = inner.start(variables.tree, key, inner.hyperparameters(variables.tree, 0))
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
    whole = _Keep(budget, "step", 0 if window is None else window.width)
    if inner.compiler is not None:
        whole.refuse("the steps are compiled")
    parts = _Keep(budget, "inputs", horizon - keep_from)
    on_graph: Iterate | None = None
    kept: dict[int, Iterate] = {}
    inputs_kept: dict[int, StepInputs] = {}
    graphs: dict[int, Iterate] = {}
    recorded: dict[str, list[Tensor]] = {"inner_loss": [], **{name: [] for name in signals}}
    for step in range(horizon):
        in_graph = window is not None and step >= window.start and whole.wanted
        with_graph = step == 0 or (step >= keep_from and (in_graph or parts.wanted))
        examined = examine if step in (0, keep_from, horizon - 1) else None
        with torch.set_grad_enabled(with_graph), inner.examined(examined, "inner_batch"):
            inputs = inner.inputs(variables.tree if with_graph else constants, step, key)
        if first_call is not None and examined is not None:
            first_call.step(variables, key, first, iterate, inputs, step)
        if step >= keep_from and parts.wanted:
            inputs_kept[step] = inputs
            parts.see(iterate, inputs, inputs)
            if not parts.wanted:
                inputs_kept.clear()
        if in_graph:
            if on_graph is None:
                on_graph = _on_graph(first if step == 0 else iterate)
            graphs[step] = on_graph
            on_graph, gradient, scalars = step_with_graph(
                inner, on_graph, inputs, step_signals, constants if of_problem else None
            )
            after = on_graph.detached()
            whole.see(iterate, inputs, (on_graph.params, on_graph.state))
            if not whole.wanted:
                graphs.clear()
        else:
            params, state, gradient, scalars = inner.run(
                inner.advance,
                iterate.params,
                iterate.state,
                detach(inputs),
                step_signals,
                constants if of_problem else None,
            )
            after = Iterate(params, state)
        if OUTER_LOSS in signals:
            scalars[OUTER_LOSS] = outer_loss_value(inner, after.params, constants, outer_batch)[0]
        if step >= keep_from and (step - keep_from) % keep_every == 0:
            iterate = replace(iterate, gradient=gradient) if keep_gradients else iterate
            kept[step] = iterate if keep_on is None else iterate.to(keep_on)
        iterate = after
        for name, value in scalars.items():
            recorded[name].append(value)
    kept[horizon] = iterate
    if graphs and on_graph is not None:
        graphs[horizon] = on_graph
    return Trajectory(
        inner=inner,
        variables=variables,
        key=key,
        steps=steps,
        first=first,
        kept=kept,
        inputs=inputs_kept,
        graphs=graphs,
        trace=Trace({name: torch.stack(values) for name, values in recorded.items()}),
        window=Window(min(keep_from, horizon - 1), horizon),
        no_graph=whole.refusal if window is not None else "",
    )


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


@final
class _Keep:
    """Whether the graphs of `count` steps are kept; open until two steps in a row were seen."""

    def __init__(self, budget: GraphBudget, kind: str, count: int) -> None:
        self._budget, self._kind, self._count = budget, kind, count
        self._before: list[Tensor] | None = None
        self._decided: bool | None = None
        self.refusal = ""
        if budget.bytes == 0:
            self.refuse("graph_budget=0")
        elif count == 0:
            self._decided = False
        elif count == 1:  # The graph of one step is there in any case.
            self._decided = True

    def refuse(self, reason: str) -> None:
        """Keep none, for a reason."""
        self._decided, self.refusal = False, reason

    @property
    def wanted(self) -> bool:
        """Whether the next step's graph is to be made and held."""
        return self._decided is not False

    def see(self, iterate: Iterate, inputs: StepInputs, made: Any) -> None:
        """Decide, by the pytree that was made with its graph, if it is not decided."""
        if self._decided is not None:
            return
        leaves = tensors_in((iterate.params, iterate.state, inputs))
        signature = tuple((x.shape, x.dtype) for x in leaves)
        device = iterate.params.device
        self._decided = self._budget.fits(self._kind, signature, self._count, device)
        tensors = tensors_in(made)
        if self._decided is None and self._before is not None:
            self._budget.measure(self._kind, signature, self._before, tensors)
            self._decided = self._budget.fits(self._kind, signature, self._count, device)
        self._before = tensors if self._decided is None else None
        if self._decided is False:
            size = self._budget.size(self._kind, signature, self._count)
            limit = self._budget.limit(device)
            self.refuse(
                f"the graph of {self._count} steps would take {size / 2**20:.3g} MiB, more than "
                f"graph_budget={limit / 2**20:.3g} MiB"
            )


def _on_graph(iterate: Iterate) -> Iterate:
    """The iterate with parameters that an inner gradient can be taken for."""
    if iterate.params.requires_grad:
        return iterate
    return replace(iterate, params=iterate.params.detach().requires_grad_())


@torch.enable_grad()
def step_with_graph(
    inner: InnerLoop,
    iterate: Iterate,
    inputs: StepInputs,
    signals: tuple[str, ...] = (),
    outer: Any = None,
) -> tuple[Iterate, Tensor, dict[str, Tensor]]:
    """((θ_{t+1}, s_{t+1}) on the graph, g_t and the per-step scalars without one)."""
    gradient, loss = inner.gradient_with_graph(iterate.params, inputs.batch)
    after = inner.update(iterate, gradient, inputs.hyperparameters)
    gradient = gradient.detach()
    with torch.no_grad():
        supplied = inner.signals(signals, gradient, after.params.detach(), outer)
    return after, gradient, {"inner_loss": loss.detach(), **supplied}


def _check_signals(inner: InnerLoop, names: set[str], params: Tensor, outer: Any) -> None:
    """Raise unless the problem supplies a scalar for every name."""
    supplied = inner.problem.signals(inner.unravel(params), outer)
    unknown = names - set(supplied)
    if unknown:
        raise ConfigurationError(
            f"unknown signals {sorted(unknown)}; known: {sorted({*SIGNALS, OUTER_LOSS, *supplied})}"
        )
    for name in sorted(names):
        check_scalar(supplied[name], f"signals()[{name!r}]")
