"""Datasets and the transforms between pixels and what the networks see."""

from dd.data.image_dataset import DatasetNotFoundError, ImageDataset, to_unit_range
from dd.data.sources import *  # noqa: F403  (whatever is one)
from dd.data.sources import __all__ as _sources
from dd.data.transforms import (
    KIPWhitening,
    LowRankKIP,
    LowRankZCA,
    PixelTransform,
    Standardize,
    ZCAWhitening,
    apply_in_chunks,
    kip_whitening,
    transform_from_state,
    zca_whitening,
)

__all__ = [
    *_sources,
    "DatasetNotFoundError",
    "ImageDataset",
    "KIPWhitening",
    "LowRankKIP",
    "LowRankZCA",
    "PixelTransform",
    "Standardize",
    "ZCAWhitening",
    "apply_in_chunks",
    "kip_whitening",
    "to_unit_range",
    "transform_from_state",
    "zca_whitening",
]
