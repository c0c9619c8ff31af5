"""The arithmetic of an outer step: what it may lose in accuracy to be faster."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import final

import torch
from torch import Tensor

from bilevel.checks import check_choice, check_flag

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@final
class Precision:
    """Which parts of an outer step run in lower precision. By default none does.

    What each costs in the direction of the hypergradient, and gains in time, is measured in
    `benchmarks/RESULTS.md`. Evaluation is always in float32, by `full_float32`.

    Args:
        inner: "bfloat16" runs the inner networks under autocast, and with them what is
            differentiated twice; parameters, optimizer and losses stay float32. "auto" does so
            where the device multiplies bfloat16 itself (`multiplies_bfloat16`). Elsewhere it is
            imitated, which takes tens of times as long as float32; asking for it all the same is
            a warning.
        outer: The same for the network on the real images.
        channels_last: Store images with their channels last, as tensor cores read them. On CUDA
            PyTorch's group norm puts them first again, so in eager mode this reaches only the
            convolutions before the first one.

    Raises:
        ValueError: An argument is not one of its values.
    """

    def __init__(
        self,
        inner: str = "float32",
        outer: str = "float32",
        channels_last: bool = False,
    ) -> None:
        self.inner = check_choice("inner", inner, ("auto", *_DTYPES))
        self.outer = check_choice("outer", outer, ("auto", *_DTYPES))
        self.channels_last = check_flag("channels_last", channels_last)

    def autocast(self, dtype: str, device: torch.device) -> AbstractContextManager[None]:
        """The context in which a network runs, `dtype` being `inner` or `outer`."""
        if dtype == "auto":
            dtype = "bfloat16" if multiplies_bfloat16(device) else "float32"
        return torch.autocast(
            device.type, _DTYPES[dtype], enabled=dtype != "float32", cache_enabled=False
        )

    def warn_if_imitated(self, device: torch.device) -> None:
        """Warn once for a precision that was asked for and that makes `device` slower."""
        if "bfloat16" in (self.inner, self.outer) and not multiplies_bfloat16(device):
            warnings.warn(
                f"Precision with 'bfloat16' on this {device.type}, which only imitates it: "
                "'auto' or 'float32' is faster by far",
                stacklevel=2,
            )

    def stored(self, images: Tensor) -> Tensor:
        """The images [N, C, H, W] in the memory format asked for."""
        if self.channels_last:
            return images.contiguous(memory_format=torch.channels_last)
        return images


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether PyTorch has fast products of bfloat16 there: on CUDA from Ampere on, and on
    processors with AVX-512."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def allow_tf32(allowed: bool) -> None:
    """Whether CUDA may round the inputs of float32 products and convolutions to TensorFloat-32.

    It holds for the whole process; PyTorch has no narrower switch.
    """
    mode = "tf32" if allowed else "ieee"
    torch.backends.cuda.matmul.fp32_precision = mode
    torch.backends.cudnn.conv.fp32_precision = mode  # type: ignore[attr-defined]


@contextmanager
def full_float32() -> Iterator[None]:
    """Within it no float32 product or convolution is rounded to TensorFloat-32."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = matmul.fp32_precision, convolution.fp32_precision
    allow_tf32(False)
    try:
        yield
    finally:
        matmul.fp32_precision, convolution.fp32_precision = before
