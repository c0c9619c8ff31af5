"""ATen operations that Inductor compiles better in other words, for `Compiler`.

Measured on a CPU, on the loss of a ConvNet-3 of width 128 on 250 images with its gradient: 757 ms
without these, 443 with them, in bfloat16 (`benchmarks/LOG.md`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions

aten = torch.ops.aten

_group_norm_backward = get_decompositions([aten.native_group_norm_backward])[
    aten.native_group_norm_backward.default
]


def _tiles(size: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """[…, H, W] as […, H/k, k, W/k, k]."""
    *leading, height, width = size
    rows, columns = kernel[0], kernel[-1]
    return [*leading, height // rows, rows, width // columns, columns]


def _is_tiling(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    divisor: int | None,
) -> bool:
    """Whether pooling cuts the image in tiles that leave nothing over, each one's mean its own."""
    return (
        list(stride or kernel) == list(kernel)
        and not any(padding)
        and divisor is None
        and size[-2] % kernel[0] == 0
        and size[-1] % kernel[-1] == 0
    )


def _average_pool(
    image: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Tensor:
    """Inductor's own reads every window by index; a mean over a view vectorises."""
    if not _is_tiling(image.shape, kernel, stride, padding, divisor):
        return NotImplemented
    return image.reshape(_tiles(image.shape, kernel)).mean((-3, -1))


def _average_pool_backward(
    cotangent: Tensor,
    image: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    """As `_average_pool`: every tile gets its share, with no search for the windows of a pixel."""
    if not _is_tiling(image.shape, kernel, stride, padding, divisor):
        return NotImplemented
    share = cotangent / (kernel[0] * kernel[-1])
    tiles = share[..., :, None, :, None].expand(_tiles(image.shape, kernel))
    return tiles.reshape(image.shape)


def _group_norm_backward_as_eager(
    cotangent: Tensor, image: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, *args: Any
) -> tuple[Tensor | None, ...]:
    """In eager mode's dtypes: Inductor's own turns bfloat16 into float32, and with it the
    convolution that comes next."""
    of_image, of_weight, of_bias = _group_norm_backward(cotangent, image, mean, rstd, weight, *args)
    dtype = image.dtype if weight is None else weight.dtype
    dtypes = (image.dtype, dtype, dtype)
    return tuple(
        found if found is None else found.to(dtype)
        for found, dtype in zip((of_image, of_weight, of_bias), dtypes, strict=True)
    )


def _is_thin(one: Tensor, other: Tensor) -> bool:
    """Whether a product has so few columns that a CPU makes its transpose three times as fast."""
    return one.device.type == "cpu" and other.shape[1] <= 16 and one.shape[0] >= 4 * other.shape[1]


def _product(one: Tensor, other: Tensor) -> Tensor:
    if not _is_thin(one, other):
        return NotImplemented
    return aten.mm.default(other.t(), one.t()).t()


def _product_with_bias(
    bias: Tensor, one: Tensor, other: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    if beta != 1 or alpha != 1 or not _is_thin(one, other):
        return NotImplemented
    return bias + aten.mm.default(other.t(), one.t()).t()


#: For `make_fx`. A function that returns NotImplemented leaves the operation as it is.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.avg_pool2d.default: _average_pool,
    aten.avg_pool2d_backward.default: _average_pool_backward,
    aten.native_group_norm_backward.default: _group_norm_backward_as_eager,
    aten.mm.default: _product,
    aten.addmm.default: _product_with_bias,
}
