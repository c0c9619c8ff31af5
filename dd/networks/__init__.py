"""The networks that are distilled on and evaluated with."""

from dd.networks.alexnet import AlexNet
from dd.networks.convnet import ConvNet
from dd.networks.embedding import embedded
from dd.networks.flat import named_parameters_of
from dd.networks.made import network_for
from dd.networks.resnet import ResNet18
from dd.networks.vgg import VGG11
from dd.networks.vit import ViT

__all__ = [
    "VGG11",
    "AlexNet",
    "ConvNet",
    "ResNet18",
    "ViT",
    "embedded",
    "named_parameters_of",
    "network_for",
]
