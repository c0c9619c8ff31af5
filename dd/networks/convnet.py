"""The convolutional network on which the field distils."""

from typing import final

from torch import Tensor, nn

from bilevel import ConfigurationError
from bilevel.checks import check_integer
from dd.runtime.sizes import LARGEST_DEPTH, LARGEST_IMAGE, LARGEST_WIDTH


@final
class ConvNet(nn.Module):
    """ConvNet-D: `depth` blocks of convolution, normalisation, ReLU and pooling, then a linear.

    A block is a 3×3 convolution to `width` channels with bias and padding 1, a normalisation of
    every channel over its own pixels, ReLU, and 2×2 average pooling, which floors odd sizes. The
    normalisation, "instance norm" in this field, is `GroupNorm(width, width)`: it has no running
    statistics, so an image's logits do not depend on the rest of its batch.

    The convolution biases are kept because the published parameter counts include them; the
    normalisation cancels them, so their gradient is zero up to rounding.

    Source: Gidaris and Komodakis, "Dynamic Few-Shot Visual Learning without Forgetting", CVPR
    2018 (arXiv 1804.09458), as used by Zhao et al., "Dataset Condensation with Gradient Matching",
    ICLR 2021 (arXiv 2006.05929).

    Args:
        num_classes: Number of logits.
        channels: Channels of an image.
        image_size: Height and width of an image, at least 2**depth.
        depth: Number of blocks; 3 for 32×32, 4 for 64×64, 5 for 128×128 images.
        width: Channels of every block.

    Raises:
        ValueError: An argument is below 1 or too large to be meant, or `image_size` is below
            2**depth.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int = 3,
        image_size: int = 32,
        depth: int = 3,
        width: int = 128,
    ) -> None:
        super().__init__()
        check_integer("num_classes", num_classes)
        check_integer("channels", channels)
        check_integer("depth", depth, 1, LARGEST_DEPTH)
        check_integer("width", width, 1, LARGEST_WIDTH)
        if check_integer("image_size", image_size, 1, LARGEST_IMAGE) < 2**depth:
            raise ConfigurationError(
                f"image_size={image_size}: with depth={depth} it must be at least {2**depth}"
            )
        blocks: list[nn.Module] = []
        for block in range(depth):
            blocks += [
                nn.Conv2d(channels if block == 0 else width, width, kernel_size=3, padding=1),
                nn.GroupNorm(width, width),
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width * (image_size // 2**depth) ** 2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, channels, image_size, image_size] to logits [N, num_classes]."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits
