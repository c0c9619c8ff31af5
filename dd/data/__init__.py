"""Datasets and the transforms between pixels and what the networks see."""

from dd.data.image_dataset import DatasetNotFoundError, ImageDataset, to_unit_range
from dd.data.sources import (
    arrays,
    cifar10,
    cifar100,
    digits,
    image_folder,
    imagenet,
    tiny_imagenet,
)
from dd.data.transforms import (
    KIPWhitening,
    PixelTransform,
    Standardize,
    ZCAWhitening,
    apply_in_chunks,
    kip_whitening,
    transform_from_state,
    zca_whitening,
)

__all__ = [
    "DatasetNotFoundError",
    "ImageDataset",
    "KIPWhitening",
    "PixelTransform",
    "Standardize",
    "ZCAWhitening",
    "apply_in_chunks",
    "arrays",
    "cifar10",
    "cifar100",
    "digits",
    "image_folder",
    "imagenet",
    "kip_whitening",
    "tiny_imagenet",
    "to_unit_range",
    "transform_from_state",
    "zca_whitening",
]
