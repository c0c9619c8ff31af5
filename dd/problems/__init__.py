"""Dataset distillation as nested optimisation problems."""

from dd.problems.meta_loss import MetaLoss
from dd.problems.prototype_alignment import PrototypeAlignment
from dd.problems.trajectory_matching import TrajectoryMatching

__all__ = ["MetaLoss", "PrototypeAlignment", "TrajectoryMatching"]
