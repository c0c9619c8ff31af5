"""The networks that are distilled on and evaluated with."""

from dd.networks.convnet import ConvNet

__all__ = ["ConvNet"]
