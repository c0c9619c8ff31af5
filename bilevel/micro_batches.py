"""An outer batch in pieces, for outer losses whose graph would not fit in memory at once."""

from collections.abc import Iterator, Sequence
from typing import Any, final

from bilevel.checks import check_number
from bilevel.errors import ConfigurationError


@final
class MicroBatches:
    """Several outer batches that stand for one: F(θ, φ) = Σᵢ wᵢ F(θ, φ; batchᵢ).

    Given to `Hypergradient` as `outer_batch`. Gradients and metrics accumulate with the same
    weights, so an outer loss that is a mean over examples gives the same hypergradient as the
    whole batch, with the graph of one piece in memory.

    Args:
        batches: What `Problem.outer_loss` takes, at least one.
        weights: One weight for each, such as its share of the examples; default: all equal,
            adding up to 1.

    Raises:
        ConfigurationError: There is no batch, or not one finite weight for each.
    """

    def __init__(self, batches: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        if not batches:
            raise ConfigurationError("batches is empty: there must be at least one")
        if weights is not None and len(weights) != len(batches):
            raise ConfigurationError(f"{len(weights)} weights for {len(batches)} batches")
        if weights is None:
            weights = [1 / len(batches)] * len(batches)
        self.batches = list(batches)
        self.weights = [
            check_number(f"weights[{index}]", weight) for index, weight in enumerate(weights)
        ]

    def __iter__(self) -> Iterator[tuple[Any, float]]:
        return iter(zip(self.batches, self.weights, strict=True))
