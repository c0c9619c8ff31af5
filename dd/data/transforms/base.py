"""The interface of pixel transforms, and what they share."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor

from bilevel.checks import check_integer
from dd.data.transforms.declared import check_state


class PixelTransform(abc.ABC):
    """A fitted, immutable, invertible map from pixels in [0, 1] to what the networks see.

    Synthetic images live behind the transform, so a distilled set means nothing without it:
    `state` travels with the set and `dd.data.transform_from_state` rebuilds it.
    Every transform is differentiable, and treats each image on its own.
    """

    kind: ClassVar[str]
    """The name under which saved artifacts know the transform."""

    elementwise: ClassVar[bool]
    """Whether every value is mapped on its own: cheap enough to do anew for every batch."""

    formula: ClassVar[str] = ""
    """`__call__` for those without this program: PyTorch that makes y of pixels x, float32
    [N, C, H, W] in [0, 1], with the tensors of `state` by their names. Text, which nothing here
    runs."""

    inverse_formula: ClassVar[str] = ""
    """The same of `inverse`: x of y."""

    tensors: ClassVar[Mapping[str, str]]
    """What defines the transform: float32 tensors by the names that its attributes have, as the
    arguments of the constructor do, and their sizes, such as "d k". A size is the same wherever its
    letter is found, and d is C·H·W. "(C, H, W)" is an int64 tensor of these three numbers."""

    @abc.abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Transform images.

        Args:
            images: [N, C, H, W], uint8, or floating point in [0, 1]. The range is not checked, so
                that learned pixels may leave it.

        Returns:
            A float32 tensor of the same shape.

        Raises:
            ValueError: The shape is not the fitted one or the dtype is not allowed.
        """

    @abc.abstractmethod
    def inverse(self, transformed: Tensor) -> Tensor:
        """Map back to pixels, without clamping them to [0, 1].

        Args:
            transformed: [N, C, H, W], floating point.

        Returns:
            A float32 tensor of the same shape.

        Raises:
            ValueError: The shape is not the fitted one or the dtype is not allowed.
        """

    def state(self) -> dict[str, Tensor]:
        """The tensors that define the transform; they are not copies, so leave them unchanged."""
        return {name: getattr(self, name) for name in self.tensors}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Rebuild the transform from `state`, bit for bit.

        Raises:
            ValueError: A tensor is missing, unknown, or has a wrong shape or dtype.
        """
        check_state(cls.kind, cls.tensors, state)
        return cls(**state)

    @property
    def device(self) -> torch.device:
        """Where the transform computes."""
        return next(iter(self.state().values())).device

    def to(self, device: torch.device | str) -> Self:
        """The same transform on another device; this one stays as it is."""
        return self.from_state({name: value.to(device) for name, value in self.state().items()})


@torch.no_grad()
def apply_in_chunks(transform: PixelTransform, images: Tensor, chunk: int = 1000) -> Tensor:
    """Transform a whole dataset, with the temporary memory of one chunk.

    Args:
        transform: The fitted transform; the chunks are computed on its device.
        images: [N, C, H, W], uint8, or floating point in [0, 1].
        chunk: Images per chunk, at least 1.

    Returns:
        float32 [N, C, H, W] on the device of `images`, without a graph.

    Raises:
        ValueError: `chunk` is not positive, or the transform refuses the images.
    """
    check_integer("chunk", chunk)
    output = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk].to(transform.device)
        output[start : start + chunk] = transform(part)
    return output


def as_float32(name: str, batch: Tensor, image_shape: tuple[int, ...]) -> Tensor:
    """Check a batch against the fitted image shape and return it as float32.

    Args:
        name: What error messages call the batch.
        batch: [N, C, H, W], floating point.
        image_shape: (C, H, W), or (C,) if the transform fits any height and width.

    Raises:
        ValueError: The shape or the dtype is not allowed.
    """
    if batch.dim() != 4 or batch.shape[1 : 1 + len(image_shape)] != image_shape:
        wanted = ", ".join(["N", *map(str, image_shape), *"HW"][:4])
        raise ValueError(f"{name} has shape {tuple(batch.shape)}; it must be [{wanted}]")
    if not batch.is_floating_point():
        raise ValueError(f"{name} has dtype {batch.dtype}; it must be floating point")
    return batch.to(torch.float32)


def as_pixels(images: Tensor, image_shape: tuple[int, ...]) -> Tensor:
    """As `as_float32`, for images that may also be uint8, which is scaled by 1/255."""
    if images.dtype == torch.uint8:
        images = images.to(torch.float32) / 255
    return as_float32("images", images, image_shape)
