"""Hypergradient estimators: how the window is differentiated.

Example:
    Gradient descent towards a point φ, which is judged against 1:

    >>> class Towards(bilevel.Problem):
    ...     def init(self, outer, *, generator):
    ...         return torch.zeros(())
    ...
    ...     def inner_batch(self, outer, step, *, generator):
    ...         return outer
    ...
    ...     def inner_loss(self, params, batch):
    ...         return 0.5 * (params - batch) ** 2
    ...
    ...     def outer_loss(self, params, outer, batch):
    ...         return 0.5 * (params - 1) ** 2
    >>> def derivative(estimator, steps):
    ...     hypergradient = bilevel.Hypergradient(
    ...         Towards(), bilevel.optim.sgd(0.5), steps, estimator=estimator
    ...     )
    ...     return round(float(hypergradient(torch.tensor(2.0)).grads), 3)

    After three steps θ = 7φ/8. Exact estimators differentiate that, an implicit one differentiates
    the optimum θ = φ, which is the same when the run gets there:

    >>> derivative(bilevel.estimators.Adjoint(), 3), derivative(bilevel.estimators.Reverse(), 3)
    (0.656, 0.656)
    >>> derivative(bilevel.estimators.Implicit(), 3)
    0.75
    >>> derivative(bilevel.estimators.Adjoint(), 20), derivative(bilevel.estimators.Implicit(), 20)
    (1.0, 1.0)
"""

from bilevel.estimators.adjoint import Adjoint, Reverse
from bilevel.estimators.base import Estimator
from bilevel.estimators.evolution_strategies import EvolutionStrategies
from bilevel.estimators.finite_difference import FiniteDifference
from bilevel.estimators.first_order import FirstOrder
from bilevel.estimators.fixed_point import FixedPoint
from bilevel.estimators.forward import Forward
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.low_rank import LowRank
from bilevel.estimators.moreau_envelope import MoreauEnvelope
from bilevel.estimators.penalty import Penalty
from bilevel.estimators.persistent_evolution_strategies import PersistentEvolutionStrategies
from bilevel.estimators.reptile import Reptile
from bilevel.estimators.value_function import ValueFunction

__all__ = [
    "Adjoint",
    "Estimator",
    "EvolutionStrategies",
    "FiniteDifference",
    "FirstOrder",
    "FixedPoint",
    "Forward",
    "Implicit",
    "LowRank",
    "MoreauEnvelope",
    "Penalty",
    "PersistentEvolutionStrategies",
    "Reptile",
    "Reverse",
    "ValueFunction",
]
