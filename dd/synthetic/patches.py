"""Images as grids of square patches."""

from torch import Tensor


def split_patches(images: Tensor, patches_per_side: int) -> Tensor:
    """Cut images into n×n patches that do not overlap.

    Args:
        images: [N, C, H, W], with H and W multiples of n.
        patches_per_side: n ≥ 1.

    Returns:
        [N·n², C, H/n, W/n], image by image, the patches of each row by row.

    Raises:
        ValueError: H or W is no multiple of n.
    """
    n = patches_per_side
    count, channels, height, width = images.shape
    if height % n or width % n:
        raise ValueError(
            f"patches_per_side={n}: images of {height}×{width} cannot be cut into {n}×{n} patches"
        )
    grid = images.reshape(count, channels, n, height // n, n, width // n)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // n, width // n)


def compose_patches(patches: Tensor, patches_per_side: int) -> Tensor:
    """Put patches together again: the inverse of `split_patches`, differentiable.

    Args:
        patches: [N·n², C, h, w].
        patches_per_side: n ≥ 1.

    Returns:
        [N, C, n·h, n·w].
    """
    n = patches_per_side
    _, channels, height, width = patches.shape
    grid = patches.reshape(-1, n, n, channels, height, width)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, n * height, n * width)
