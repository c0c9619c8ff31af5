"""Where datasets come from: each function returns an `ImageDataset`."""

from dd.data.sources.arrays import arrays
from dd.data.sources.cifar import cifar10, cifar100
from dd.data.sources.digits import digits
from dd.data.sources.hugging_face import hugging_face
from dd.data.sources.image_folder import image_folder
from dd.data.sources.imagenet import imagenet
from dd.data.sources.tiny_imagenet import tiny_imagenet
from dd.data.sources.torchvision_sets import torchvision

__all__ = [
    "arrays",
    "cifar10",
    "cifar100",
    "digits",
    "hugging_face",
    "image_folder",
    "imagenet",
    "tiny_imagenet",
    "torchvision",
]
