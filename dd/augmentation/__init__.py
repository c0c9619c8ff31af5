"""Random, differentiable augmentations of batches of images."""

from dd.augmentation.base import Augmentation
from dd.augmentation.dsa import DSA
from dd.augmentation.flip_or_rotate import FlipOrRotate
from dd.augmentation.none import NoAugmentation

__all__ = ["DSA", "Augmentation", "FlipOrRotate", "NoAugmentation"]
