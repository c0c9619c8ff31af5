"""ATen operations that Inductor compiles better in other words, for `Compiler`.

Measured on a CPU (`benchmarks/LOG.md`): the loss of a ConvNet-3 of width 128 on 250 images with its
gradient, in bfloat16, 757 ms without these, 443 with them; a step of logistic regression and back
through it 381 µs without those of the soft-maximum, 319 with them.
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


def _is_transposed(matrix: Tensor) -> bool:
    return matrix.dim() == 2 and matrix.stride(0) < matrix.stride(1)


def _log_softmax(scores: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """In the layout of the scores: Inductor's own is contiguous, and transposes for the products
    before and after it."""
    if _is_transposed(scores):
        return _log_softmax(scores.t(), 1 - dim % 2, half_to_float).t()
    dtype = torch.float32 if half_to_float or scores.dtype.itemsize == 2 else scores.dtype
    wide = scores.to(dtype)
    shifted = wide - wide.amax(dim, keepdim=True) if wide.numel() else wide
    found = shifted - shifted.exp().sum(dim, keepdim=True).log()
    return found if half_to_float else found.to(scores.dtype)


def _log_softmax_backward(
    cotangent: Tensor, output: Tensor, dim: int, dtype: torch.dtype
) -> Tensor:
    """As `_log_softmax`."""
    if _is_transposed(output):
        return _log_softmax_backward(cotangent.t(), output.t(), 1 - dim % 2, dtype).t()
    wide = torch.float32 if output.dtype.itemsize == 2 else output.dtype
    given = cotangent.to(wide)
    return (given - output.to(wide).exp() * given.sum(dim, keepdim=True)).to(dtype)


def _nll_loss_backward(
    cotangent: Tensor,
    log_probabilities: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: Tensor,
) -> Tensor:
    """Of a matrix, in its layout, and with labels as int32, as many to a vector as of float32."""
    if log_probabilities.dim() != 2:
        return NotImplemented
    mean, classes = 1, log_probabilities.shape[1]
    share = -cotangent / total_weight if reduction == mean else -cotangent
    row = share.expand(target.shape)
    if weight is not None:
        row = row * weight[target.clamp(0, classes - 1)]
    if 0 <= ignore_index < classes:
        row = torch.where(target == ignore_index, 0, row)
    labels = target.to(torch.int32)
    every = torch.arange(classes, dtype=torch.int32, device=target.device)
    if _is_transposed(log_probabilities):
        return torch.where(every[:, None] == labels, row, 0).t()
    return torch.where(every == labels[:, None], row[:, None], 0)


#: For `make_fx`. A function that returns NotImplemented leaves the operation as it is.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.avg_pool2d.default: _average_pool,
    aten.avg_pool2d_backward.default: _average_pool_backward,
    aten.native_group_norm_backward.default: _group_norm_backward_as_eager,
    aten._log_softmax.default: _log_softmax,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten.nll_loss_backward.default: _nll_loss_backward,
    aten.mm.default: _product,
    aten.addmm.default: _product_with_bias,
}
