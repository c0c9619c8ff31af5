"""Dataset distillation as nested optimisation problems."""

from dd.problems.meta_loss import MetaLoss
from dd.problems.prototype_alignment import PrototypeAlignment

__all__ = ["MetaLoss", "PrototypeAlignment"]
