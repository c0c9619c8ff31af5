"""What a rollout records: iterates, per-step signals, and the window chosen over them."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.errors import ConfigurationError
from bilevel.random import Key


@dataclass(frozen=True)
class Window:
    """The inner steps [start, stop) that are differentiated; the outer loss is taken at θ_stop.

    Raises:
        ConfigurationError: Unless 0 ≤ start < stop.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ConfigurationError(
                f"window [{self.start}, {self.stop}): start must be at least 0 and below stop"
            )

    @property
    def width(self) -> int:
        """The number of inner steps that are differentiated."""
        return self.stop - self.start


@dataclass(frozen=True)
class Iterate:
    """One point of the inner run.

    Attributes:
        params: θ_t ∈ R^p, flat.
        state: s_t, the optimizer's state.
        gradient: ∇_θ ℓ(θ_t, b_t) ∈ R^p, where the rollout was asked to keep it.
    """

    params: Tensor
    state: Any
    gradient: Tensor | None = None


def affordable_spacing(iterate: Iterate, count: int, kept_on: torch.device | None = None) -> int:
    """The smallest k such that keeping every k-th of `count` iterates is cheap where they are kept.

    Cheap is 96 MiB on a CPU and 1/64 of an accelerator's memory, for the ⌈count / k⌉ kept ones and
    the k of a recomputed segment; for what an accelerator keeps in the host's memory, a quarter of
    that. Where nothing is, k = ⌈√count⌉, which takes the least memory.
    """
    leaves = [iterate.params, iterate.gradient, *optree.tree_leaves(iterate.state)]
    size = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
    device = iterate.params.device
    budget = 96 * 2**20
    if device.type == "cuda":
        budget = torch.cuda.get_device_properties(device).total_memory // 64
    if kept_on is not None and kept_on.type == "cpu" and device.type != "cpu":
        budget = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    least = max(1, math.ceil(math.sqrt(count)))
    for spacing in range(1, least):
        segment = spacing if spacing > 1 else 0
        if (math.ceil(count / spacing) + segment) * size <= budget:
            return spacing
    return least


@dataclass(frozen=True)
class Trace(Mapping[str, Tensor]):
    """Per-step scalars of a rollout by name, each of shape [horizon].

    `inner_loss` (ℓ at θ_t, t = 0 … horizon−1) is always there; the truncation schedule may ask for
    more: `gradient_norm` (‖∇_θ ℓ‖₂ at θ_t), or any of `Problem.signals` (at θ_{t+1}).
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
    """A recorded inner run. It holds no autograd graph.

    Attributes:
        kept: Iterates by step, those from which every other one is recomputed exactly.
        key: The randomness of this run.
        steps: The length T of a full inner run; `horizon` ≤ T steps of it were run.
        trace: Per-step signals.
        window: What is differentiated.
    """

    kept: dict[int, Iterate]
    key: Key
    steps: int
    trace: Trace
    window: Window

    @property
    def horizon(self) -> int:
        """The number of inner steps that were run."""
        return self.trace.horizon

    def select(self, window: Window) -> "Trajectory":
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

    def last_kept(self, step: int) -> int:
        """The latest step ≤ `step` whose iterate is kept."""
        return max(kept for kept in self.kept if kept <= step)
