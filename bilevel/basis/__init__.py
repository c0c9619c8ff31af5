"""In which few directions `LowRank` keeps the inner Hessian."""

from bilevel.basis.base import Anchor, Basis, LowRankMatrix
from bilevel.basis.eigenvectors import Eigenvectors
from bilevel.basis.krylov import Krylov

__all__ = ["Anchor", "Basis", "Eigenvectors", "Krylov", "LowRankMatrix"]
