"""A dataset split, with its transform, where it can be read fast: what the rest works on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel import Key
from dd.augmentation import Augmentation
from dd.data.image_dataset import ImageDataset
from dd.data.stored_images import Images, StoredImages, TransformedOnce
from dd.data.transforms import PixelTransform, apply_in_chunks

#: Transforms are fitted on this many random training images, or on all if there are fewer.
MOST_FITTED = 100_000
#: How many steps are read ahead of the one that is asked for, each in a thread of its own.
STEPS_AHEAD = 2


@final
@dataclass(frozen=True, eq=False)
class PreparedData:
    """Images, which read as transformed float32 [N, C, H, W], and labels, int64 [N]: three parts.

    Every choice is made on `validation`, which is held out of the training set; the test part is
    for the one number that is reported at the end.
    """

    transform: PixelTransform
    class_names: tuple[str, ...]
    train_images: Images
    train_labels: Tensor
    validation_images: Images
    validation_labels: Tensor
    test_images: Images
    test_labels: Tensor

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)


def prepare(
    dataset: ImageDataset,
    fit_transform: Callable[[Tensor], PixelTransform] | PixelTransform,
    validation_fraction: float,
    seed: int,
    device: torch.device,
    images_on: str = "device",
) -> PreparedData:
    """Hold out a validation part, fit the transform on the rest, and put it behind everything.

    On the device, images are held as they are stored (uint8, most often) under an elementwise
    transform, which is applied to every batch anew, and transformed (float32) under any other:
    whitening anew would cost 5 % of every outer loss and 15 % of every evaluation. A GPU whitens
    all of them at once; on a CPU, where that takes as long as the first steps, each is whitened
    when it is first read. On the host they stay as they are stored under any transform.

    Args:
        dataset: The raw images.
        fit_transform: A function from training images to a fitted transform, or one that is
            fitted already. It is given 100,000 random training images where there are more.
        validation_fraction: Share of the training set to hold out.
        seed: Of the split.
        device: Where images are read to, and labels live.
        images_on: Where images are kept: "device", or "host" for what does not fit there.
    """
    train, validation = dataset.split_validation(validation_fraction, seed)
    if isinstance(fit_transform, PixelTransform):
        transform = fit_transform.to(device)
    else:
        fitted = _random_rows(train, MOST_FITTED, Key(seed).fold("fit"))
        transform = fit_transform(dataset.train_images[fitted].to(device))
        if not isinstance(transform, PixelTransform):
            raise ValueError(
                f"the transform is a {type(transform).__name__}; what fits it must return a "
                "PixelTransform"
            )

    def stored(pixels: Tensor) -> StoredImages:
        if images_on == "host":
            return StoredImages(pixels, transform, device, on_host=True)
        pixels = pixels.to(device)
        if transform.elementwise:
            return StoredImages(pixels, transform)
        if device.type == "cpu":
            return StoredImages(TransformedOnce(pixels, transform))
        return StoredImages(apply_in_chunks(transform, pixels))

    images = stored(dataset.train_images)
    return PreparedData(
        transform=transform,
        class_names=dataset.class_names,
        train_images=images.subset(train),
        train_labels=dataset.train_labels[train].to(device),
        validation_images=images.subset(validation),
        validation_labels=dataset.train_labels[validation].to(device),
        test_images=stored(dataset.test_images),
        test_labels=dataset.test_labels.to(device),
    )


def _random_rows(rows: Tensor, most: int, key: Key) -> Tensor:
    """At most `most` of `rows`, ascending."""
    if len(rows) <= most:
        return rows
    return rows[torch.randperm(len(rows), generator=key.generator())[:most].sort().values]


@final
class RealBatches:
    """Augmented mini-batches of real images, each a pure function of the step it is for.

    The training set is gone through in a new random order every epoch; what is left over at the
    end of an epoch is dropped.

    With a `pool`, every batch is drawn anew, without repetition, from what it holds at that step.

    Images that are kept on the host are read ahead, so that no step waits for them.

    Args:
        images: N of them.
        labels: int64 [N].
        size: Images in a batch; N if it is more than that.
        augmentation: Applied to every batch.
        key: The randomness of order and augmentation.
        pool: From a step to the indices that its batch may hold; default: all, by epochs.
    """

    def __init__(
        self,
        images: Images,
        labels: Tensor,
        size: int,
        augmentation: Augmentation,
        key: Key,
        pool: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.images = StoredImages(images) if isinstance(images, Tensor) else images
        self.labels = labels
        self.size = min(size, len(images))
        self.augmentation = augmentation
        self.key = key
        self.pool = pool
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)
        self._ahead = ReadAhead(self._index, self.images.read) if self.images.on_host else None

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch (images, labels) of outer step `step`."""
        if self._ahead is None:
            index = self._index(step)
            pixels = self.images.read(index)
        else:
            index, pixels = self._ahead.at(step)
        images = self.images.transformed(pixels)
        images = self.augmentation(images, self.key.generator("augmentation", step))
        return images, self.labels[index.to(self.labels.device)]

    def _index(self, step: int) -> Tensor:
        """Which images the batch of `step` holds, where the images are kept."""
        kept_on = torch.device("cpu") if self.images.on_host else self.images.device
        if self.pool is not None:
            pool, generator = self.pool(step).to(kept_on), self.key.generator("pool", step)
            drawn = torch.randperm(len(pool), generator=generator, device=generator.device)
            return pool[drawn[: self.size].to(kept_on)]
        epoch, position = divmod(step, len(self.images) // self.size)
        if epoch != self._epoch:
            generator = self.key.generator("epoch", epoch)
            order = torch.randperm(len(self.images), generator=generator, device=generator.device)
            self._epoch, self._order = epoch, order.to(kept_on)
        return self._order[position * self.size : (position + 1) * self.size]


@final
class ReadAhead:
    """Reads for a step in background threads, a few steps before it is asked for.

    Threads, not processes: reading is one copy of memory, or waiting for the disk, during which
    PyTorch holds no lock, so nothing has to be started, pickled, or sent back.

    Args:
        index: What to read for a step; a pure function, called in the thread that calls `at`.
        read: Reads it; called in the background.
    """

    def __init__(self, index: Callable[[int], Tensor], read: Callable[[Tensor], Tensor]) -> None:
        self._index, self._read = index, read
        self._threads = ThreadPoolExecutor(STEPS_AHEAD, thread_name_prefix="read-ahead")
        self._pending: dict[int, tuple[Tensor, Future[Tensor]]] = {}

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """(what `index` says for `step`, what `read` returns for it).

        Raises:
            Exception: Whatever `read` raised.
        """
        wanted = range(step, step + STEPS_AHEAD + 1)
        self._pending = {s: pending for s, pending in self._pending.items() if s in wanted}
        for later in wanted:
            if later not in self._pending:
                index = self._index(later)
                self._pending[later] = index, self._threads.submit(self._read, index)
        index, reading = self._pending.pop(step)
        return index, reading.result()
