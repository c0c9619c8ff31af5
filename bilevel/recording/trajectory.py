"""What a rollout records: iterates, what each step took of φ, signals, and the chosen window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import ConfigurationError, ProblemError
from bilevel.random import Key
from bilevel.recording.block import Block, run_forward
from bilevel.recording.inner import InnerLoop
from bilevel.recording.short_run import ShortRun
from bilevel.recording.unrolled import Unrolled
from bilevel.tree import detach
from bilevel.variables import Iterate, OuterVariables, StepInputs
from bilevel.window import Window


@dataclass(frozen=True)
class Trace(Mapping[str, Tensor]):
    """Per-step scalars of a rollout by name, each of shape [horizon].

    `inner_loss` (ℓ at θ_t, t = 0 … horizon−1) is always there; the truncation schedule may ask for
    more: `gradient_norm` (‖∇_θ ℓ‖₂ at θ_t), `outer_loss` (F at θ_{t+1}), or any of
    `Problem.signals` (at θ_{t+1}).
    """

    signals: dict[str, Tensor]

    @property
    def horizon(self) -> int:
        """The number of inner steps that were run."""
        return len(self.signals["inner_loss"])

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.signals:
            raise KeyError(f"signal {name!r} was not recorded; recorded: {sorted(self.signals)}")
        return self.signals[name]

    def __iter__(self) -> Any:
        return iter(self.signals)

    def __len__(self) -> int:
        return len(self.signals)


@dataclass(frozen=True)
class Trajectory:
    """A recorded inner run, made by `record`.

    Only what the recording kept of the graphs from φ is on a graph: `first`, `inputs` and
    `unrolled`. Each of these graphs can be differentiated once.

    Attributes:
        inner: The inner loop that was run.
        variables: φ, as leaves of a private graph.
        key: The randomness of this run.
        steps: The length T of a full inner run; `horizon` ≤ T steps of it were run.
        first: (θ_0, s_0), on the graph of φ.
        kept: Iterates by step, those from which every other one is recomputed exactly.
        inputs: By step, what steps took of φ, on its graph, where that was kept.
        blocks: Steps that were made as loops, where the steps are compiled.
        short_run: The whole run with its derivative, where it was made as one graph.
        unrolled: The window with its whole graph, where that was kept.
        no_graph: Why it was not, a sentence; empty where nobody asked.
        trace: Per-step signals.
        window: What is differentiated.
        replica: Which of several independent runs for one hypergradient this is, from 0.
    """

    inner: InnerLoop
    variables: OuterVariables
    key: Key
    steps: int
    first: Iterate
    kept: dict[int, Iterate]
    inputs: dict[int, StepInputs]
    unrolled: Unrolled | None
    trace: Trace
    window: Window
    no_graph: str = ""
    blocks: tuple[Block, ...] = ()
    short_run: ShortRun | None = None
    replica: int = 0

    @property
    def horizon(self) -> int:
        """The number of inner steps that were run."""
        return self.trace.horizon

    @property
    def has_graph(self) -> bool:
        """Whether the window was recorded with its graph."""
        return self.unrolled is not None and self.unrolled.window == self.window

    def select(self, window: Window) -> Trajectory:
        """The same recording with another window.

        Raises:
            ConfigurationError: The window ends after the recording or starts before the first
                iterate that was kept.
        """
        first = min(self.kept)
        if window.stop > self.horizon or window.start < first:
            raise ConfigurationError(
                f"window [{window.start}, {window.stop}) lies outside the recording, whose "
                f"iterates go from {first} to {self.horizon}"
            )
        return replace(self, window=window)

    @property
    def in_blocks(self) -> bool:
        """Whether all steps of the window were made as loops."""
        window = self.window
        made = sum(
            max(0, min(b.stop, window.stop) - max(b.start, window.start)) for b in self.blocks
        )
        return made == window.width

    def blocks_backward(self) -> Iterator[Block]:
        """The window's part of every block, the last one first, with iterates and inputs.

        Iterates that were not kept are recomputed, inputs whose graph was not kept are made again.
        """
        for block in reversed(self.blocks):
            start, stop = max(block.start, self.window.start), min(block.stop, self.window.stop)
            if start >= stop:
                continue
            part = block.part(block.start, stop)
            if not part.on_graph:
                inputs = list(map(self.inputs_at, range(part.start, stop)))
                made = Block.of(part.start, inputs, on_graph=True, like=part.layout)
                part = replace(made, iterates=part.iterates)
            if part.iterates is None:
                _, part, _ = run_forward(self.inner, part, self._kept_at(part.start), keep=True)
            yield part.part(start, stop)

    def keeps_inputs(self, step: int) -> bool:
        """Whether what a step took of φ was kept, with its graph."""
        return step in self.inputs or any(
            block.start <= step < block.stop and block.on_graph for block in self.blocks
        )

    def inputs_at(self, step: int) -> StepInputs:
        """(b_t, h_t) on the graph of φ: as recorded, or made again.

        Raises:
            ProblemError: Making them again failed, though it had not before.
        """
        if step in self.inputs:
            return self.inputs[step]
        for block in self.blocks:
            if block.start <= step < block.stop and block.on_graph:
                return block.inputs(step)
        with torch.enable_grad():
            return self.made_again(self.variables.tree, step)

    def made_again(self, outer: Any, step: int) -> StepInputs:
        """(b_t, h_t) for some outer variables, with the randomness of this run.

        Raises:
            ProblemError: That failed, though it had not before.
        """
        try:
            return self.inner.inputs(outer, step, self.key)
        except Exception as error:
            raise ProblemError(
                f"inner_batch raised {type(error).__name__} when inner step {step} was made "
                f"again ({error}), though it had not before. {_REPEATABLE}"
            ) from error

    @torch.no_grad()
    def iterate_at(self, step: int) -> Iterate:
        """(θ_t, s_t) for any t from the first kept iterate on, recomputed if need be."""
        return self._segment(max(kept for kept in self.kept if kept <= step), step)[-1]

    def iterates_backward(self) -> Iterator[tuple[int, Iterate]]:
        """(t, (θ_t, s_t)) for t = stop−1 down to start.

        With every k-th iterate kept, one segment of k is recomputed at a time, from the same
        batches and the same randomness, so the iterates are those of the rollout. Where gradients
        were kept, all but the last iterate of a recomputed segment have theirs.
        """
        step = self.window.stop - 1
        for first in sorted(self.kept, reverse=True):
            if first > step:
                continue
            segment = self._segment(first, step)
            while segment and step >= self.window.start:
                yield step, segment.pop()
                step -= 1
            if step < self.window.start:
                return

    @torch.no_grad()
    def _segment(self, first: int, last: int) -> list[Iterate]:
        """The iterates first … last, from the kept one at `first`."""
        for block in self.blocks:
            if block.start <= first and last < block.stop and block.iterates is not None:
                return [block.iterate(step).to(self._device) for step in range(first, last + 1)]
        segment = [self._kept_at(first)]
        keeps_gradients = segment[0].gradient is not None
        for step in range(first, last):
            if self.keeps_inputs(step):
                inputs = detach(self.inputs_at(step))
            else:
                inputs = detach(self.made_again(detach(self.variables.tree), step))
            before = segment[-1]
            params, state, gradient, _ = self.inner.run(
                self.inner.advance, before.params, before.state, inputs, ()
            )
            if keeps_gradients:
                segment[-1] = replace(segment[-1], gradient=gradient)
            segment.append(Iterate(params, state))
        return segment

    def _kept_at(self, step: int) -> Iterate:
        return self.kept[step].to(self._device)

    @property
    def _device(self) -> torch.device:
        return self.first.params.device

    def check_repeated(self, losses: Mapping[int, Tensor]) -> None:
        """Compare inner losses that an estimator has evaluated again with the recorded ones.

        They may differ by rounding, which is taken as the root of the rounding unit times the
        largest loss of the run.

        Args:
            losses: ℓ(θ_t, b_t) by step t.

        Raises:
            ProblemError: One differs, so the hypergradient would be that of another run.
        """
        if not losses:
            return
        steps = sorted(losses)
        recorded = self.trace["inner_loss"]
        again = torch.stack([losses[step].detach() for step in steps]).to(recorded)
        before = recorded[steps]
        scale = recorded.abs().max() * torch.finfo(self.first.params.dtype).eps ** 0.5
        off = ((again - before).abs() > scale) & torch.isfinite(before)
        if not bool(off.any()):
            return
        index = int(off.nonzero()[-1])
        step = steps[index]
        method = "inner_batch or inner_loss"
        if self.keeps_inputs(step):
            method = "inner_loss (or the batch it is given, if that was written to after its step)"
        raise ProblemError(
            f"{method} is not the same when it is run again: the inner loss of step {step} was "
            f"{float(before[index]):.6g} and is now {float(again[index]):.6g}, from the same "
            f"parameters. {_REPEATABLE}"
        )


#: What to do about a step that differs when it is run again.
_REPEATABLE = (
    "A step must be a pure function of its arguments (docs/contract.md): draw from the generator "
    "that inner_batch is given, choose examples by `step`, and let no module, counter or iterator "
    "change while it runs; bilevel.gradcheck looks at every method"
)
