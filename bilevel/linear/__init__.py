"""Linear systems with matrices that are known through their products, and ways to solve them."""

from bilevel.linear.conjugate_gradient import ConjugateGradient
from bilevel.linear.dense import Dense
from bilevel.linear.eigendecomposition import (
    RandomizedEigendecomposition,
    randomized_eigendecomposition,
)
from bilevel.linear.gmres import GMRES
from bilevel.linear.lanczos import Lanczos
from bilevel.linear.neumann import Neumann
from bilevel.linear.normal_conjugate_gradient import NormalConjugateGradient
from bilevel.linear.nystrom import Nystrom
from bilevel.linear.operator import HessianOperator, LinearOperator
from bilevel.linear.solver import Solution, Solver

__all__ = [
    "GMRES",
    "ConjugateGradient",
    "Dense",
    "HessianOperator",
    "Lanczos",
    "LinearOperator",
    "Neumann",
    "NormalConjugateGradient",
    "Nystrom",
    "RandomizedEigendecomposition",
    "Solution",
    "Solver",
    "randomized_eigendecomposition",
]
