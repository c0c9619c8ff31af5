"""The state of a distillation, saved so that a resumed run equals an uninterrupted one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

import bilevel
from dd.runtime.files import DamagedFileError, read_tensors, write_tensors

FORMAT = "dd-checkpoint-2"
#: Of version 0.1.
OLD_FORMAT = "dd-checkpoint-1"
#: In `TrainingState.rates`, the outer step after which rates hold.
FROM_STEP = "after_outer_step"
#: What the optimizers keep for every outer variable.
_SLOTS = {
    torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.SGD: {"momentum_buffer"},
}


@final
@dataclass
class TrainingState:
    """Everything that changes from one outer step to the next.

    All randomness is keyed by the step number and the process, so no generator is part of it, and
    it is the same in every process.

    Attributes:
        outer: The outer variables.
        optimizer: Their optimizer.
        clip: The hypergradient's clipping, None without.
        truncation: The schedule.
        average: The moving average of what is stored of the images, None without.
        step: Outer steps done.
        seconds: Wall clock spent in outer steps, over all processes that worked on this run.
        best_accuracy: Best validation accuracy so far, a fraction; None before the first.
        best_step: The step it was seen at.
        processes: How many processes averaged their hypergradients in the last step.
        skipped: Outer steps that were left out, for their hypergradient was not finite.
        skipped_in_a_row: Of these, the last ones.
        validation_due: Whether the last step is to be followed by a validation, which was put off.
        rate_scale: What the outer learning rates are multiplied by.
        rates: The outer learning rates so far, each from the step on that it names.
        circumstances: Of the data and the machine, as `Task` has them.
    """

    outer: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    clip: bilevel.clip.Clip | None
    truncation: bilevel.truncation.Truncation
    average: dict[str, Tensor] | None = None
    step: int = 0
    seconds: float = 0.0
    best_accuracy: float | None = None
    best_step: int | None = None
    processes: int = 1
    skipped: int = 0
    skipped_in_a_row: int = 0
    validation_due: bool = False
    rate_scale: float = 1.0
    rates: list[dict[str, float]] = field(default_factory=list)
    circumstances: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def set_rates(self) -> bool:
        """Give the optimizer its rates, and note them if they are others; whether they are."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.rate_scale
        now = dict(zip(self.outer, (g["lr"] for g in self.optimizer.param_groups), strict=True))
        before = {k: v for k, v in self.rates[-1].items() if k != FROM_STEP} if self.rates else None
        if before != now:
            self.rates = [*self.rates, {FROM_STEP: self.step, **now}]
        return before not in (None, now)

    def check_finite(self) -> None:
        """Raise `bilevel.NonFiniteError` if an outer variable, or its average, is not finite."""
        averages = {f"average of {name}": value for name, value in (self.average or {}).items()}
        tensors = {**self.outer, **averages}
        bad = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
        if bad:
            raise bilevel.NonFiniteError(f"the outer step made {' and '.join(bad)} non-finite")

    def save(self, path: Path, previous: Path | None = None) -> None:
        """Write one safetensors file, atomically; what it replaces is then called `previous`.

        Raises:
            bilevel.NonFiniteError: The state is not finite, and nothing is written.
        """
        self.check_finite()
        tensors = {f"outer.{name}": value for name, value in self.outer.items()}
        for name, value in (self.average or {}).items():
            tensors[f"average.{name}"] = value
        for index, slots in self.optimizer.state_dict()["state"].items():
            for name, value in slots.items():
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
        truncation: dict[str, Any] = {}
        for name, value in self.truncation.state_dict().items():
            if isinstance(value, Tensor):
                tensors[f"truncation.{name}"] = value
            else:
                truncation[name] = value
        write_tensors(
            path,
            tensors,
            {
                "format": FORMAT,
                "clip": None if self.clip is None else self.clip.state_dict(),
                "truncation": truncation,
                "step": self.step,
                "seconds": self.seconds,
                "best_accuracy": self.best_accuracy,
                "best_step": self.best_step,
                "processes": self.processes,
                "skipped": self.skipped,
                "skipped_in_a_row": self.skipped_in_a_row,
                **({"validation_due": True} if self.validation_due else {}),
                "rate_scale": self.rate_scale,
                "rates": self.rates,
                "circumstances": self.circumstances,
            },
            previous,
        )

    def restore(self, path: Path) -> None:
        """Continue from a file that `save` wrote.

        Raises:
            DamagedFileError: It is damaged, or belongs to another configuration.
        """
        tensors, metadata = read_tensors(path)
        if metadata.get("format") == OLD_FORMAT:
            raise DamagedFileError(f"{path} was made by version 0.1, whose runs cannot be resumed")
        if metadata.get("format") != FORMAT:
            raise DamagedFileError(f"{path} is no checkpoint ({metadata.get('format')!r})")

        def group(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): value
                for name, value in tensors.items()
                if name.startswith(prefix)
            }

        outer = group("outer.")
        shapes = {name: tuple(value.shape) for name, value in outer.items()}
        expected = {name: tuple(value.shape) for name, value in self.outer.items()}
        if shapes != expected:
            raise DamagedFileError(
                f"{path} holds outer variables {shapes}; this configuration has {expected}"
            )
        slots: dict[int, dict[str, Tensor]] = {}
        try:
            for name, value in group("optimizer.").items():
                index, slot = name.split(".", 1)
                slots.setdefault(int(index), {})[slot] = value
            incomplete = [
                index
                for index, state in slots.items()
                if set(state) != _SLOTS[type(self.optimizer)] or index >= len(outer)
            ]
            average, kept = group("average."), self.average or {}
            if average.keys() != kept.keys():
                raise ValueError("the average of the images is missing, or not wanted")
            if incomplete or len(slots) not in (0, len(outer)):
                raise ValueError("the optimizer's state is incomplete")
            if self.clip is not None:
                self.clip.load_state_dict(metadata["clip"])
            self.truncation.load_state_dict({**metadata["truncation"], **group("truncation.")})
            self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
            self.best_accuracy, self.best_step = metadata["best_accuracy"], metadata["best_step"]
            self.processes = int(metadata["processes"])
            self.skipped = int(metadata["skipped"])
            self.skipped_in_a_row = int(metadata["skipped_in_a_row"])
            # Said only where it is so.
            self.validation_due = bool(metadata.get("validation_due", False))
            self.rate_scale = float(metadata["rate_scale"])
            self.rates = [dict(rates) for rates in metadata["rates"]]
            self.circumstances = dict(metadata["circumstances"])
        except (KeyError, TypeError, ValueError, bilevel.ConfigurationError) as error:
            raise DamagedFileError(f"{path} is no complete checkpoint: {error}") from error
        with torch.no_grad():
            for name, value in outer.items():
                self.outer[name].copy_(value)
            for name, value in average.items():
                kept[name].copy_(value)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
