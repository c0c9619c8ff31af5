"""Invertible maps between pixels in [0, 1] and what the networks see."""

from dd.data.transforms.base import PixelTransform, apply_in_chunks
from dd.data.transforms.fitting import kip_whitening, zca_whitening
from dd.data.transforms.kip import KIPWhitening
from dd.data.transforms.low_rank import LowRankKIP, LowRankZCA
from dd.data.transforms.restore import transform_from_state
from dd.data.transforms.standardize import Standardize
from dd.data.transforms.zca import ZCAWhitening

__all__ = [
    "KIPWhitening",
    "LowRankKIP",
    "LowRankZCA",
    "PixelTransform",
    "Standardize",
    "ZCAWhitening",
    "apply_in_chunks",
    "kip_whitening",
    "transform_from_state",
    "zca_whitening",
]
