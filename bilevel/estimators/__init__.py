"""Hypergradient estimators: how the window is differentiated."""

from bilevel.estimators.adjoint import Adjoint
from bilevel.estimators.base import Estimator
from bilevel.estimators.evolution_strategies import EvolutionStrategies
from bilevel.estimators.finite_difference import FiniteDifference
from bilevel.estimators.fixed_point import FixedPoint
from bilevel.estimators.forward import Forward
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.low_rank import LowRank
from bilevel.estimators.persistent_evolution_strategies import PersistentEvolutionStrategies
from bilevel.estimators.reverse import Reverse

__all__ = [
    "Adjoint",
    "Estimator",
    "EvolutionStrategies",
    "FiniteDifference",
    "FixedPoint",
    "Forward",
    "Implicit",
    "LowRank",
    "PersistentEvolutionStrategies",
    "Reverse",
]
