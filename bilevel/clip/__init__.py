"""Clipping of hypergradients, whose norms vary over orders of magnitude between windows."""

from bilevel.clip.base import Clip
from bilevel.clip.moving_average import MovingAverageClip
from bilevel.clip.moving_average_rows import MovingAverageRowClip

__all__ = ["Clip", "MovingAverageClip", "MovingAverageRowClip"]
