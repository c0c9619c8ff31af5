"""The run itself: step by step, or many steps as one compiled loop."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from bilevel.compiler import NotAlikeError
from bilevel.errors import CompileWarning
from bilevel.random import Key
from bilevel.recording.block import Block, run_forward
from bilevel.recording.inner import SIGNALS, InnerLoop
from bilevel.recording.outer_gradient import MicroBatches, outer_loss_value
from bilevel.recording.short_run import ShortRun
from bilevel.recording.stacking import BLOCK_BYTES, InputLayout, varying_bytes
from bilevel.recording.unrolled import KeptGraphs, Unrolled
from bilevel.tree import detach, to_device
from bilevel.variables import Iterate, OuterVariables, StepInputs
from bilevel.window import Window

if TYPE_CHECKING:
    from bilevel.first_call import FirstCall

#: The per-step signal that takes the outer batch: F at θ_{t+1}.
OUTER_LOSS = "outer_loss"


@final
@dataclass
class Rollout:
    """A run under way: what `record` was told, and what has been recorded so far.

    Attributes:
        kept: Iterates by step.
        inputs: By step, what steps took of φ, on its graph, while there is room for that.
        blocks: The steps that were made as loops.
        scalars: Per-step scalars by name, in pieces of shape [steps].
    """

    inner: InnerLoop
    variables: OuterVariables
    constants: Any
    key: Key
    horizon: int
    signals: Sequence[str]
    outer_batch: Any
    keep_from: int
    keep_every: int
    keep_on: torch.device | None
    keep_gradients: bool
    parts: KeptGraphs
    first_call: FirstCall | None
    kept: dict[int, Iterate] = field(default_factory=dict)
    inputs: dict[int, StepInputs] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    scalars: dict[str, list[Tensor]] = field(default_factory=dict)

    def run(
        self, iterate: Iterate, first: Iterate, whole: KeptGraphs, window: Window | None
    ) -> Unrolled | None:
        """Every step by itself, those of the window with their graph if `whole` has room for it."""
        unrolled: Unrolled | None = None
        known = 0  # the step whose iterate is `iterate`
        for step in range(self.horizon):
            in_graph = window is not None and window.start <= step < window.stop and whole.wanted
            inputs = self._draw(step, in_graph)
            self._check(iterate, inputs, step)
            self._keep_inputs(iterate, inputs, step)
            if in_graph and unrolled is None:
                whole.probe(self.inner, iterate, inputs)
                if whole.wanted:
                    unrolled = Unrolled(self.inner, first if step == 0 else iterate, step)
            if in_graph and unrolled is not None:
                self._add({"inner_loss": unrolled.step(inputs)})
                if known == step:
                    self._keep(iterate, step)
                # Nobody asks for iterates inside a window that is kept whole, but a first call.
                if self.first_call is not None or step + 1 == unrolled.start + whole.count:
                    iterate, known = unrolled.iterate(), step + 1
            else:
                iterate, known = self._step(iterate, inputs, step), step + 1
        self.kept[self.horizon] = iterate
        return unrolled

    def run_compiled(self, iterate: Iterate, whole: KeptGraphs) -> ShortRun | None:
        """Many steps at once, as one loop; a short run with its derivative, if `whole` has room."""
        layout: InputLayout | None = None
        in_loops = not (OUTER_LOSS in self.signals and isinstance(self.outer_batch, MicroBatches))
        step = 0
        while step < self.horizon:
            drawn = self._draw_block(iterate, step)
            if self.first_call is not None:
                self._check_block(iterate, drawn, step)
            if whole.wanted and len(drawn) == self.horizon and self.parts.wanted:
                whole.probe(self.inner, iterate, drawn[0])
                if whole.wanted:
                    return self._short_run(iterate, drawn)
            if in_loops:
                try:
                    on_graph = step >= self.keep_from and self.parts.wanted
                    block = Block.of(step, drawn, on_graph=on_graph, like=layout)
                    iterate = self._loop(iterate, block)
                    layout, step = block.layout, block.stop
                    continue
                except NotAlikeError as reason:
                    in_loops = False
                    warnings.warn(
                        f"compiled steps are made one by one, not as a loop: {reason}",
                        CompileWarning,
                        stacklevel=4,
                    )
            for inputs in drawn:
                self._keep_inputs(iterate, inputs, step)
                iterate, step = self._step(iterate, inputs, step), step + 1
        self.kept[self.horizon] = iterate
        return None

    def _short_run(self, iterate: Iterate, drawn: list[StepInputs]) -> ShortRun:
        run = ShortRun.of(self.inner, iterate, drawn, self.variables.own_tree, self.outer_batch)
        self.inputs.update(enumerate(drawn))
        self.kept.update({0: iterate, self.horizon: run.end})
        self.scalars["inner_loss"] = [run.inner_losses]
        return run

    def _draw(self, step: int, in_graph: bool) -> StepInputs:
        wanted = step >= self.keep_from and (in_graph or self.parts.wanted)
        with_graph = wanted or self.first_call is not None
        tree = self.variables.tree if with_graph else self.constants
        inputs = self.inner.inputs(tree, step, self.key)
        if self.first_call is not None and self._looked_at_closely(step):
            self.first_call.drawn(inputs, step)
        return inputs

    def _draw_block(self, iterate: Iterate, step: int) -> list[StepInputs]:
        """Inputs from `step` on for as many steps as may be made at once."""
        stop = self.horizon if step >= self.keep_from else self.keep_from
        if step >= self.keep_from and self.keep_every > 1:
            done = (step - self.keep_from) % self.keep_every
            stop = min(stop, step - done + self.keep_every)
        drawn = [self._draw(t, in_graph=False) for t in range(step, min(step + 2, stop))]
        if step >= self.keep_from and self.parts.wanted:
            for inputs in drawn:
                self.parts.see(iterate, inputs, inputs)
        size = varying_bytes(drawn[-1], drawn[0])
        stop = min(stop, step + max(2, BLOCK_BYTES // max(1, size)))
        return drawn + [self._draw(t, in_graph=False) for t in range(step + len(drawn), stop)]

    def _looked_at_closely(self, step: int) -> bool:
        return step in (0, self.keep_from, self.horizon - 1)

    def _check_block(self, iterate: Iterate, drawn: list[StepInputs], step: int) -> None:
        """Look at steps before they are made, in eager mode."""
        for offset, inputs in enumerate(drawn):
            self._check(iterate, inputs, step + offset)
            params, state, *_ = self.inner.advance(iterate.params, iterate.state, detach(inputs))
            iterate = Iterate(params, state)

    def _check(self, iterate: Iterate, inputs: StepInputs, step: int) -> None:
        if self.first_call is not None:
            self.first_call.step(iterate, inputs, step, briefly=not self._looked_at_closely(step))

    def _keep_inputs(self, iterate: Iterate, inputs: StepInputs, step: int) -> None:
        if step >= self.keep_from and self.parts.wanted:
            self.inputs[step] = inputs
            self.parts.see(iterate, inputs, inputs)
            if not self.parts.wanted:
                self.inputs.clear()

    def _keep(self, iterate: Iterate, step: int, gradient: Tensor | None = None) -> None:
        if step >= self.keep_from and (step - self.keep_from) % self.keep_every == 0:
            iterate = replace(iterate, gradient=gradient) if self.keep_gradients else iterate
            self.kept[step] = iterate if self.keep_on is None else iterate.to(self.keep_on)

    def _step(self, iterate: Iterate, inputs: StepInputs, step: int) -> Iterate:
        """One step by itself."""
        inner, names = self.inner, self._names()
        outer = self.constants if set(names) - set(SIGNALS) else None
        params, state, gradient, found = inner.run(
            inner.advance, iterate.params, iterate.state, detach(inputs), names, outer
        )
        if OUTER_LOSS in self.signals:
            found[OUTER_LOSS] = outer_loss_value(inner, params, self.constants, self.outer_batch)[0]
        self._keep(iterate, step, gradient)
        self._add(found)
        return Iterate(params, state)

    def _loop(self, iterate: Iterate, block: Block) -> Iterate:
        """All steps of a block at once."""
        keep = block.start >= self.keep_from and self.keep_every == 1
        after, made, found = run_forward(
            self.inner,
            block,
            iterate,
            signals=_signals if self.signals else None,
            of_signals=self._of_signals(),
            keep=keep,
            keep_gradients=self.keep_gradients,
        )
        if block.start >= self.keep_from:
            self.kept[block.start] = iterate if self.keep_on is None else iterate.to(self.keep_on)
            made = replace(
                made, iterates=to_device(made.iterates, self.keep_on or after.params.device)
            )
            self.blocks.append(made)
        for name, values in found.items():
            self.scalars.setdefault(name, []).append(values)
        return after

    def _names(self) -> tuple[str, ...]:
        return tuple(name for name in self.signals if name != OUTER_LOSS)

    def _of_signals(self) -> tuple[Any, ...]:
        if not self.signals:
            return ()
        with_loss = OUTER_LOSS in self.signals
        return self._names(), self.constants, with_loss, self.outer_batch if with_loss else None

    def _add(self, found: dict[str, Tensor]) -> None:
        for name, value in found.items():
            self.scalars.setdefault(name, []).append(value.reshape(1))


def _signals(
    inner: InnerLoop,
    gradient: Tensor,
    after: Tensor,
    names: tuple[str, ...],
    outer: Any,
    with_outer_loss: bool,
    outer_batch: Any,
) -> dict[str, Tensor]:
    """What a schedule wants to know of a step, from g_t and θ_{t+1}."""
    found = inner.signals(names, gradient, after, outer)
    if with_outer_loss:
        found[OUTER_LOSS] = outer_loss_value(inner, after, outer, outer_batch)[0]
    return found
