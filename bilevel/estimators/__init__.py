"""Hypergradient estimators: how the window is differentiated."""

from bilevel.estimators.adjoint import Adjoint
from bilevel.estimators.base import Estimator
from bilevel.estimators.forward import Forward
from bilevel.estimators.reverse import Reverse

__all__ = ["Adjoint", "Estimator", "Forward", "Reverse"]
