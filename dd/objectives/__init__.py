"""What the outer loop may minimise over the synthetic set."""

from dd.objectives.base import HELD_OUT, Goal, Objective
from dd.objectives.match_experts import MatchExperts
from dd.objectives.real_images import RealImages

__all__ = ["HELD_OUT", "Goal", "MatchExperts", "Objective", "RealImages"]
