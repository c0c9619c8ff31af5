"""Where datasets come from: each function returns an :class:`~dd.data.ImageDataset`."""

from dd.data.sources.arrays import arrays
from dd.data.sources.cifar import cifar10, cifar100
from dd.data.sources.digits import digits
from dd.data.sources.image_folder import image_folder
from dd.data.sources.imagenet import imagenet
from dd.data.sources.tiny_imagenet import tiny_imagenet

__all__ = [
    "arrays",
    "cifar10",
    "cifar100",
    "digits",
    "image_folder",
    "imagenet",
    "tiny_imagenet",
]
