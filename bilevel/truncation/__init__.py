"""Truncation schedules: which inner steps are differentiated."""

from bilevel.truncation.base import Truncation
from bilevel.truncation.by_fraction import ByFraction
from bilevel.truncation.by_metric import ByMetric
from bilevel.truncation.distribution import StepDistribution
from bilevel.truncation.effective_steps import EffectiveSteps
from bilevel.truncation.full import Full
from bilevel.truncation.last import Last
from bilevel.truncation.policy import WithinTrajectoryPolicy
from bilevel.truncation.random import RandomWindow
from bilevel.truncation.softmax import Softmax
from bilevel.truncation.stage_aware import StageAware
from bilevel.truncation.transition import Stage, Transition

__all__ = [
    "ByFraction",
    "ByMetric",
    "EffectiveSteps",
    "Full",
    "Last",
    "RandomWindow",
    "Softmax",
    "Stage",
    "StageAware",
    "StepDistribution",
    "Transition",
    "Truncation",
    "WithinTrajectoryPolicy",
]
