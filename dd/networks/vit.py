"""A small vision transformer."""

from typing import final

import torch
from torch import Tensor, nn

from bilevel import ConfigurationError
from bilevel.checks import check_integer
from dd.runtime.sizes import LARGEST_DEPTH, LARGEST_IMAGE, LARGEST_WIDTH


@final
class ViT(nn.Module):
    """Patches, learned positions, pre-norm transformer blocks, and the mean token to the logits.

    Attention is written out, because the fused kernels have no second derivative; LayerNorm is
    the only normalisation.

    Source: Dosovitskiy et al., arXiv 2010.11929, with mean pooling in place of a class token.

    Args:
        num_classes: Number of logits.
        channels: Channels of an image.
        image_size: Height and width of an image, a multiple of `patch`.
        patch: Height and width of a patch.
        width: Length of a token, a multiple of `heads`.
        depth: Number of blocks.
        heads: Attention heads of a block.

    Raises:
        ValueError: An argument is too small, too large to be meant, or does not divide what it
            has to.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int = 3,
        image_size: int = 32,
        patch: int = 4,
        width: int = 128,
        depth: int = 6,
        heads: int = 4,
    ) -> None:
        super().__init__()
        check_integer("num_classes", num_classes)
        check_integer("channels", channels)
        check_integer("image_size", image_size, 1, LARGEST_IMAGE)
        check_integer("patch", patch)
        check_integer("width", width, 1, LARGEST_WIDTH)
        check_integer("depth", depth, 1, LARGEST_DEPTH)
        check_integer("heads", heads)
        if image_size % patch:
            raise ConfigurationError(f"patch={patch}: it must divide image_size={image_size}")
        if width % heads:
            raise ConfigurationError(f"heads={heads}: it must divide width={width}")
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = _Positions((image_size // patch) ** 2, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, channels, image_size, image_size] to logits [N, num_classes]."""
        tokens = self.positions(self.patches(images).flatten(2).transpose(1, 2))
        logits: Tensor = self.classifier(self.norm(self.blocks(tokens)).mean(dim=1))
        return logits


class _Positions(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(count, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.embedding


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        projected = self.queries_keys_values(self.norm(tokens))
        query, key, value = projected.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=-1)
        tokens = tokens + self.mix((weights @ value).transpose(1, 2).flatten(2))
        return tokens + self.feed_forward(tokens)
