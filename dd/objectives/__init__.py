"""What the outer loop may minimise over the synthetic set."""

from dd.objectives.base import HELD_OUT, Objective, PreparedObjective
from dd.objectives.match_experts import MatchExperts
from dd.objectives.real_images import RealImages

__all__ = ["HELD_OUT", "MatchExperts", "Objective", "PreparedObjective", "RealImages"]
