"""Truncation schedules: which inner steps are differentiated."""

from bilevel.truncation.base import Truncation
from bilevel.truncation.full import Full
from bilevel.truncation.last import Last
from bilevel.truncation.minimum_distance import MinimumDistance
from bilevel.truncation.random import RandomWindow

__all__ = ["Full", "Last", "MinimumDistance", "RandomWindow", "Truncation"]
