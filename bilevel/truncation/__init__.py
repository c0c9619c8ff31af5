"""Truncation schedules: which inner steps are differentiated.

Example:
    >>> bilevel.truncation.Full().plan(40, torch.Generator()).window
    Window(start=0, stop=40)
    >>> bilevel.truncation.Last(window=10).plan(40, torch.Generator()).window
    Window(start=30, stop=40)

    A schedule with stages learns of every outer step:

    >>> stages = bilevel.truncation.ByFraction(middle=0.3, late=0.7)
    >>> schedule = bilevel.truncation.StageAware(10, width_range=3, transition=stages)
    >>> schedule.update({"progress": 0.5})
    'the early stage ends and the middle stage begins at 50.0 % of the outer run'
"""

from bilevel.truncation.base import Truncation
from bilevel.truncation.distribution import EffectiveSteps, Softmax, StepDistribution
from bilevel.truncation.full import Full
from bilevel.truncation.last import Last
from bilevel.truncation.log_uniform import LogUniform
from bilevel.truncation.minimum_distance import MinimumDistance
from bilevel.truncation.pessimistic import Pessimistic
from bilevel.truncation.policy import WithinTrajectoryPolicy
from bilevel.truncation.random import RandomWindow
from bilevel.truncation.stage_aware import StageAware
from bilevel.truncation.transition import ByFraction, ByMetric, Stage, Transition
from bilevel.window import Plan

__all__ = [
    "ByFraction",
    "ByMetric",
    "EffectiveSteps",
    "Full",
    "Last",
    "LogUniform",
    "MinimumDistance",
    "Pessimistic",
    "Plan",
    "RandomWindow",
    "Softmax",
    "Stage",
    "StageAware",
    "StepDistribution",
    "Transition",
    "Truncation",
    "WithinTrajectoryPolicy",
]
