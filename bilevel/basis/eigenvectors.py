"""The leading eigenvectors of the Hessian, as published."""

from collections.abc import Mapping
from typing import Any, final

import torch

from bilevel.basis.base import Anchor, Basis, LowRankMatrix
from bilevel.checks import check_integer, check_number
from bilevel.errors import ConfigurationError
from bilevel.linear import randomized_eigendecomposition


@final
class Eigenvectors(Basis):
    """H ≈ V diag(s) Vᵀ with the eigenvalues largest in magnitude, by random sketching.

    It is here to reproduce AT-BPTT's low-rank Hessian approximation, not to save time: it takes
    (rank + oversampling)(power_iterations + 2) products, which at the published 32, 4 and 2 is 144,
    where the exact recursion takes one for each step of the window. Nor does it look at λ, which is
    seldom along the leading eigenvectors; `Krylov` is closer with a tenth of the products.

    Kept across outer steps as in AT-BPTT++, it costs one product where it is not refreshed: whether
    the Hessian is still the one that was kept is looked at along u, where it was first applied. Its
    eigenvectors then belong to an earlier θ: that saves something only while every outer step
    starts its run at the same θ_0 and uses nearby windows, not with fresh networks.

    Args:
        rank: At least 1.
        oversampling: As in `bilevel.linear.randomized_eigendecomposition`.
        power_iterations: As there.
        refresh_every: Calls after which it is computed anew, at least 1; 1 keeps nothing.
        refresh_change: It is also computed anew where ‖∇_θ ℓ‖ at the anchor, or Hu for the u of the
            last time, has changed by this part of its size since then, above 0.

    Raises:
        ConfigurationError: An argument outside its range; in a call, a kept basis for another
            number of parameters.

    Source: AT-BPTT, arXiv 2510.04838, with Halko et al., arXiv 0909.4061; keeping: AT-BPTT++, which
    looks at the gradient norm alone.
    """

    def __init__(
        self,
        rank: int = 32,
        oversampling: int = 4,
        power_iterations: int = 2,
        refresh_every: int = 1,
        refresh_change: float = 0.2,
    ) -> None:
        self.rank = check_integer("rank", rank)
        self.oversampling = check_integer("oversampling", oversampling, 0)
        self.power_iterations = check_integer("power_iterations", power_iterations, 0)
        self.refresh_every = check_integer("refresh_every", refresh_every)
        self.refresh_change = check_number("refresh_change", refresh_change, above=0)
        if self.refresh_every > 1:
            self.carries_over = f"its eigenvectors (refresh_every={self.refresh_every})"
        self._kept: dict[str, Any] = {}

    def approximate(self, anchor: Anchor) -> LowRankMatrix:
        if self._kept and len(self._kept["vectors"]) != len(anchor.gradient):
            raise ConfigurationError(
                f"refresh_every={self.refresh_every}: the kept eigenvectors have "
                f"{len(self._kept['vectors'])} entries, this inner problem {len(anchor.gradient)} "
                "parameters: use a basis of its own for each"
            )
        norm = float(torch.linalg.vector_norm(anchor.gradient))
        if self._is_stale(anchor, norm):
            values, vectors = randomized_eigendecomposition(
                anchor.hessian,
                self.rank,
                oversampling=self.oversampling,
                power_iterations=self.power_iterations,
                generator=anchor.generator,
            )
            if self.refresh_every == 1:
                return LowRankMatrix(values, vectors)
            self._kept = {
                "values": values,
                "vectors": vectors,
                "direction": anchor.direction,
                "image": anchor.image,
                "gradient_norm": norm,
                "age": 0,
            }
        self._kept["age"] += 1
        return LowRankMatrix(
            self._kept["values"].to(anchor.gradient), self._kept["vectors"].to(anchor.gradient)
        )

    def _is_stale(self, anchor: Anchor, norm: float) -> bool:
        kept = self._kept
        if not kept or kept["age"] >= self.refresh_every:
            return True
        if abs(norm - kept["gradient_norm"]) >= self.refresh_change * kept["gradient_norm"]:
            return True
        image = kept["image"].to(anchor.gradient)
        change = anchor.hessian(kept["direction"].to(anchor.gradient)) - image
        size = self.refresh_change * torch.linalg.vector_norm(image)
        return bool(torch.linalg.vector_norm(change) > size)

    def state_dict(self) -> dict[str, Any]:
        """The kept eigenpairs, what they were made for, and how many calls they have served."""
        return dict(self._kept)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        expected = {"values", "vectors", "direction", "image", "gradient_norm", "age"}
        if state and (set(state) != expected or self.refresh_every == 1):
            raise ConfigurationError(
                f"Eigenvectors(refresh_every={self.refresh_every}) cannot continue from a state "
                f"with {sorted(state)}"
            )
        self._kept = dict(state)
