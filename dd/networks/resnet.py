"""ResNet18 for small images, without running statistics."""

from typing import final

from torch import Tensor, nn
from torch.nn import functional as F

from bilevel.checks import check_integer
from dd.runtime.sizes import LARGEST_IMAGE, LARGEST_WIDTH


@final
class ResNet18(nn.Module):
    """A 3×3 stem, four stages of two basic blocks, average pooling, one linear layer.

    Per-channel GroupNorm stands where batch normalisation was. The pooling is over whatever the
    last stage leaves: 4×4 for 32×32 images.

    Source: He et al., arXiv 1512.03385, in the form of Zhao et al., arXiv 2006.05929.

    Args:
        num_classes: Number of logits.
        channels: Channels of an image.
        image_size: Height and width of an image, at least 16.
        width: Channels of the first stage; each of the others doubles them.

    Raises:
        ValueError: An argument is too small, or too large to be meant.
    """

    def __init__(
        self, num_classes: int, channels: int = 3, image_size: int = 32, width: int = 64
    ) -> None:
        super().__init__()
        check_integer("num_classes", num_classes)
        check_integer("channels", channels)
        check_integer("image_size", image_size, 16, LARGEST_IMAGE)
        check_integer("width", width, 1, LARGEST_WIDTH)
        # GroupNorm needs more than one pixel to take a variance over.
        self.stem = nn.Sequential(*_convolution(channels, width, 3, 1), nn.ReLU())
        blocks: list[nn.Module] = []
        before = width
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(_BasicBlock(before, width * 2**stage, stride))
                before = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(before, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, channels, image_size, image_size] to logits [N, num_classes]."""
        logits: Tensor = self.classifier(self.blocks(self.stem(images)).mean(dim=(2, 3)))
        return logits


class _BasicBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *_convolution(before, after, 3, stride), nn.ReLU(), *_convolution(after, after, 3, 1)
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(*_convolution(before, after, 1, stride))

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.residual(images) + self.shortcut(images))


def _convolution(before: int, after: int, size: int, stride: int) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False)
    return convolution, nn.GroupNorm(after, after)
