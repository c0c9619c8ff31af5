"""The directions that the backward recursion itself will visit."""

from typing import final

import torch
from torch import Tensor

from bilevel.basis.base import Anchor, Basis, LowRankMatrix
from bilevel.checks import check_integer, check_number
from bilevel.linear import Lanczos

#: Below this exponent a growing direction is not followed further: e⁶⁰⁰ is still a number.
LARGEST_EXPONENT = 600.0


@final
class Krylov(Basis):
    """Lanczos from the incoming cotangent, on the Hessian as the optimizer sees it.

    With D = diag(response) and A = D^½ H D^½, k products give orthonormal Q from D^½λ, and

        H ≈ D^{−½} Q (QᵀAQ) Qᵀ D^{−½}

    For gradient descent with or without momentum D is a multiple of I, and a recursion of W steps
    with a constant H stays in the Krylov space of λ: rank W + 1 is then exact. For Adam and its
    like, D is the diagonal by which the gradient is scaled at the anchor.

    k grows until the gradient flow through the window, exp(−W·QᵀAQ)e₁, changes by less than
    `tolerance` of its norm from k − 2 to k; until `max_rank`; or until the basis spans an invariant
    subspace, where there is nothing to add for gradient descent. (The flow stands in for the
    recursion: it costs no products and, for Adam, no passes through the optimizer.)

    Args:
        max_rank: The largest k, at least 1.
        tolerance: At least 0; 0 always goes on to `max_rank`.

    Raises:
        ConfigurationError: An argument outside its range.

    Source: Saad, SIAM J. Numer. Anal. 29 (1992), for functions of a matrix times a vector.
    """

    def __init__(self, max_rank: int = 12, tolerance: float = 1e-2) -> None:
        self.max_rank = check_integer("max_rank", max_rank)
        self.tolerance = check_number("tolerance", tolerance, minimum=0)

    def approximate(self, anchor: Anchor) -> LowRankMatrix:
        root = anchor.response.sqrt()
        start = root * anchor.cotangent
        process = Lanczos(start, self.max_rank)
        flows: list[Tensor] = []
        while process.next is not None:
            if flows:
                image = root * anchor.hessian(root * process.next)
            else:
                image = root * anchor.image / torch.linalg.vector_norm(start)
            process.extend(image)
            flows.append(_flow(process.matrix, anchor.steps))
            if len(flows) > 2 and _relative_change(flows[-3], flows[-1]) < self.tolerance:
                break
        values, vectors = torch.linalg.eigh(process.matrix)
        order = values.abs().argsort(descending=True)
        return LowRankMatrix(
            values[order].to(start),
            process.basis @ vectors[:, order].to(start) / root[:, None],
        )


def _flow(matrix: Tensor, steps: int) -> Tensor:
    """exp(−steps·matrix) e₁."""
    values, vectors = torch.linalg.eigh(matrix)
    growth = (-steps * values).clamp(max=LARGEST_EXPONENT).exp()
    return vectors @ (growth * vectors[0])


def _relative_change(before: Tensor, after: Tensor) -> float:
    """‖after − before‖ / ‖after‖, the shorter vector filled up with zeros."""
    difference = after.clone()
    difference[: len(before)] -= before
    return float(difference.norm() / after.norm())
