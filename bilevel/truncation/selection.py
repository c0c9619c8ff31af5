"""A distribution over windows, from which one is drawn for every outer step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.errors import ConfigurationError
from bilevel.window import Window


@final
@dataclass(frozen=True, eq=False)
class Selection:
    """P(window [starts[i], stops[i])) = probabilities[i] over a run of T = `steps` inner steps.

    Attributes:
        probabilities: float64 [N], summing to one.
        starts: int64 [N], at least 0.
        stops: int64 [N], above `starts` and at most `steps`.
        steps: T.
    """

    probabilities: Tensor
    starts: Tensor
    stops: Tensor
    steps: int

    @classmethod
    def uniform(cls, width: int, steps: int) -> "Selection":
        """Every window of this width with the same probability, as in RaT-BPTT."""
        starts = torch.arange(steps - width + 1)
        probabilities = torch.full((len(starts),), 1 / len(starts), dtype=torch.float64)
        return cls(probabilities, starts, starts + width, steps)

    def draw(self, generator: torch.Generator) -> Window:
        """One window; `generator` is on the CPU."""
        index = int(torch.multinomial(self.probabilities, 1, generator=generator))
        return Window(int(self.starts[index]), int(self.stops[index]))

    def mirrored(self) -> "Selection":
        """The distribution of [T − stop, T − start): the run read from its end."""
        return Selection(
            self.probabilities, self.steps - self.stops, self.steps - self.starts, self.steps
        )

    def report(self) -> dict[str, float | Tensor]:
        """What to watch.

        `effective_windows` = exp(entropy) says among how many windows the choice really is;
        `start_probability`, float64 [T], is the chance that the window starts at each inner step.
        """
        entropy = torch.special.entr(self.probabilities).sum()
        start_probability = torch.zeros(self.steps, dtype=torch.float64)
        start_probability.index_add_(0, self.starts, self.probabilities)
        return {"effective_windows": float(entropy.exp()), "start_probability": start_probability}

    def state_dict(self) -> dict[str, int | Tensor]:
        """Its tensors, and T."""
        return {
            "probabilities": self.probabilities,
            "starts": self.starts,
            "stops": self.stops,
            "steps": self.steps,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Selection":
        """The selection that `state_dict` described.

        Raises:
            ConfigurationError: It describes none.
        """
        try:
            found = cls(*(state[name] for name in ("probabilities", "starts", "stops", "steps")))
            possible = (
                found.probabilities.shape == found.starts.shape == found.stops.shape
                and bool((found.starts >= 0).all() and (found.starts < found.stops).all())
                and bool((found.stops <= found.steps).all())
                and abs(float(found.probabilities.sum()) - 1) < 1e-6
            )
        except (KeyError, AttributeError, TypeError) as error:
            raise ConfigurationError(f"{sorted(state)} describe no selection: {error}") from error
        if not possible:
            raise ConfigurationError(f"{dict(state)} is no distribution over windows of a run")
        return found
