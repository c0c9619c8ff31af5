"""What the outer loop may minimise over the synthetic set."""

from dd.objectives.alignment import PrototypeAlignment
from dd.objectives.base import HELD_OUT, Objective, PreparedObjective, Task
from dd.objectives.difficulty import DifficultyPacing
from dd.objectives.discrepancy import CharacteristicFunctions, Discrepancy, MeanFeatures
from dd.objectives.experts import Experts
from dd.objectives.match_experts import MatchExperts
from dd.objectives.match_features import MatchFeatures
from dd.objectives.real_images import RealImages

__all__ = [
    "HELD_OUT",
    "CharacteristicFunctions",
    "DifficultyPacing",
    "Discrepancy",
    "Experts",
    "MatchExperts",
    "MatchFeatures",
    "MeanFeatures",
    "Objective",
    "PreparedObjective",
    "PrototypeAlignment",
    "RealImages",
    "Task",
]
