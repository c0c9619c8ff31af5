"""Images of a prepared dataset: kept as they are stored, read as the networks see them."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from dd.data.transforms import PixelTransform

#: How many images are transformed together, by `TransformedOnce`.
LEAST_AT_ONCE, MOST_AT_ONCE = 256, 1000


@final
class TransformedOnce:
    """Images that are transformed when they are first read, and then kept, float32.

    A run that begins does not wait for images that it reads later, or never. What is read has the
    bits of the whole set transformed at once: a product of few rows is summed in another order than
    one of many, so at least `LEAST_AT_ONCE` images are transformed together.

    Args:
        pixels: [M, C, H, W], what `transform` takes.
        transform: Treats every image on its own.
    """

    def __init__(self, pixels: Tensor, transform: PixelTransform) -> None:
        self._pixels = pixels
        self._transform = transform
        # Memory that is not written to yet costs nothing.
        self._images = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
        self._is_missing = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
        self.shape, self.dtype, self.device = pixels.shape, torch.float32, pixels.device

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """The images at `rows`, int64 [n]: float32 [n, C, H, W]."""
        wanted = rows[self._is_missing[rows]].unique()
        if len(wanted):
            self._make(wanted)
        return self._images[rows]

    @torch.no_grad()
    def _make(self, wanted: Tensor) -> None:
        if len(wanted) < LEAST_AT_ONCE:
            is_wanted = torch.zeros_like(self._is_missing)
            is_wanted[wanted] = True
            others = (self._is_missing & ~is_wanted).nonzero().squeeze(1)
            made = (~self._is_missing).nonzero().squeeze(1)
            wanted = torch.cat([wanted, others, made])[:LEAST_AT_ONCE]
        for rows in wanted.tensor_split(-(-len(wanted) // MOST_AT_ONCE)):
            self._images[rows] = self._transform(self._pixels[rows])
        self._is_missing[wanted] = False


@final
class StoredImages:
    """Some images of a stored set, transformed when they are read.

    Indexing with a slice or with int64 indices [n] gives float32 [n, C, H, W] on `device`.

    Args:
        pixels: [M, C, H, W], what `transform` takes; without one, floating point. They may be made
            as they are read.
        transform: Applied to what is read; None if `pixels` are transformed already.
        device: Where images are read to; default: where `pixels` are.
        on_host: `pixels` stay in the host's memory, or in a memory-mapped file, and only what is
            read goes to `device`.
        rows: Which of `pixels` these images are, int64 [N]; default: all of them.
    """

    def __init__(
        self,
        pixels: Tensor | TransformedOnce,
        transform: PixelTransform | None = None,
        device: torch.device | None = None,
        on_host: bool = False,
        rows: Tensor | None = None,
    ) -> None:
        self.device = pixels.device if device is None else device
        self.on_host = on_host
        self._pixels = pixels
        self._transform = transform
        everything = torch.arange(len(pixels), device=pixels.device)
        self._rows = everything if rows is None else rows.to(pixels.device)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return self.transformed(self.read(index))

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size((len(self), *self._pixels.shape[1:]))

    def subset(self, rows: Tensor) -> StoredImages:
        """The images at `rows`, int64 [n]; the pixels are shared, not copied."""
        chosen = self._rows[rows.to(self._rows.device)]
        return StoredImages(self._pixels, self._transform, self.device, self.on_host, chosen)

    def read(self, index: Tensor | slice) -> Tensor:
        """The stored pixels of some images, for `transformed`; may be called from any thread.

        Those that are on their way to a GPU are put in page-locked memory, from which they are
        copied without waiting.
        """
        if not isinstance(index, slice):
            # Towards the device nobody need wait; an index from there must have arrived.
            index = index.to(self._rows.device, non_blocking=index.device.type == "cpu")
        rows = self._rows[index]
        pixels = self._pixels
        if not (isinstance(pixels, Tensor) and self.on_host and self.device.type == "cuda"):
            return pixels[rows]
        shape = (len(rows), *pixels.shape[1:])
        target = torch.empty(shape, dtype=pixels.dtype, pin_memory=True)
        return torch.index_select(pixels, 0, rows, out=target)

    @torch.no_grad()
    def transformed(self, pixels: Tensor) -> Tensor:
        """What `read` returned, on `device` and transformed."""
        pixels = pixels.to(self.device, non_blocking=True)
        return pixels if self._transform is None else self._transform(pixels)


#: Images as the networks see them: in a tensor, or made from their stored form when indexed.
Images = Tensor | StoredImages
