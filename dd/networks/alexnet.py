"""AlexNet as the field evaluates with it."""

from typing import final

from torch import Tensor, nn

from bilevel.checks import check_integer
from dd.runtime.sizes import LARGEST_IMAGE, LARGEST_WIDTH


@final
class AlexNet(nn.Module):
    """Five convolutions, three of them followed by 2×2 max-pooling, and a linear layer.

    5×5 to 128 channels, pool, 5×5 to 192, pool, 3×3 to 256, 192, 192, pool; ReLU after each, no
    normalisation.

    Source: Zhao et al., "Dataset Condensation with Gradient Matching", ICLR 2021 (arXiv
    2006.05929), a small form of Krizhevsky et al., NeurIPS 2012.

    Args:
        num_classes: Number of logits.
        channels: Channels of an image.
        image_size: Height and width of an image, at least 8.
        width: Channels of the first convolution; the others have 3/2, 2, 3/2 and 3/2 of it.

    Raises:
        ValueError: An argument is too small, or too large to be meant.
    """

    def __init__(
        self, num_classes: int, channels: int = 3, image_size: int = 32, width: int = 128
    ) -> None:
        super().__init__()
        check_integer("num_classes", num_classes)
        check_integer("channels", channels)
        check_integer("image_size", image_size, 8, LARGEST_IMAGE)
        check_integer("width", width, 1, LARGEST_WIDTH)
        middle = width * 3 // 2
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, middle, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(middle, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, middle, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(middle, middle, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Linear(middle * (image_size // 8) ** 2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, channels, image_size, image_size] to logits [N, num_classes]."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits
