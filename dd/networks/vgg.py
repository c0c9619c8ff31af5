"""VGG11 without running statistics."""

from typing import final

from torch import Tensor, nn

from bilevel.checks import check_integer
from dd.runtime.sizes import LARGEST_IMAGE, LARGEST_WIDTH

#: Channels of every convolution, in units of the first; None is 2×2 max-pooling.
_LAYERS = (1, None, 2, None, 4, 4, None, 8, 8, None, 8, 8, None)


@final
class VGG11(nn.Module):
    """Eight 3×3 convolutions with per-channel GroupNorm, five poolings, one linear layer.

    Source: configuration A of Simonyan and Zisserman, arXiv 1409.1556, with the single linear
    layer and the normalisation of Zhao et al., arXiv 2006.05929.

    Args:
        num_classes: Number of logits.
        channels: Channels of an image.
        image_size: Height and width of an image, at least 32.
        width: Channels of the first convolution; the last has 8 times as many.

    Raises:
        ValueError: An argument is too small, or too large to be meant.
    """

    def __init__(
        self, num_classes: int, channels: int = 3, image_size: int = 32, width: int = 64
    ) -> None:
        super().__init__()
        check_integer("num_classes", num_classes)
        check_integer("channels", channels)
        check_integer("image_size", image_size, 32, LARGEST_IMAGE)
        check_integer("width", width, 1, LARGEST_WIDTH)
        layers: list[nn.Module] = []
        for factor in _LAYERS:
            if factor is None:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [
                nn.Conv2d(channels, factor * width, 3, padding=1),
                nn.GroupNorm(factor * width, factor * width),
                nn.ReLU(),
            ]
            channels = factor * width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * (image_size // 32) ** 2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, channels, image_size, image_size] to logits [N, num_classes]."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits
