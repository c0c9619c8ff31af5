"""Dataset distillation as nested optimisation problems."""

from dd.problems.meta_loss import MetaLoss

__all__ = ["MetaLoss"]
