"""A dataset split, transformed and put on the device: what distillation and evaluation read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel import Key
from dd.augmentation import Augmentation
from dd.data.image_dataset import ImageDataset
from dd.data.transforms import PixelTransform, apply_in_chunks


@final
@dataclass(frozen=True, eq=False)
class PreparedData:
    """Transformed images, float32 [N, C, H, W], and labels, int64 [N], in three parts.

    Every choice is made on `validation`, which is held out of the training set; the test part is
    for the one number that is reported at the end.
    """

    transform: PixelTransform
    class_names: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    test_images: Tensor
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
) -> PreparedData:
    """Hold out a validation part, fit the transform on the rest, and apply it to everything.

    Args:
        dataset: The raw images.
        fit_transform: A function from training images to a fitted transform, or one that is
            fitted already.
        validation_fraction: Share of the training set to hold out.
        seed: Of the split.
        device: Where the result lives.
    """
    train, validation = dataset.split_validation(validation_fraction, seed)
    train_images = dataset.train_images[train]
    if isinstance(fit_transform, PixelTransform):
        transform = fit_transform.to(device)
    else:
        transform = fit_transform(train_images.to(device))

    def transformed(images: Tensor) -> Tensor:
        return apply_in_chunks(transform, images.to(device))

    return PreparedData(
        transform=transform,
        class_names=dataset.class_names,
        train_images=transformed(train_images),
        train_labels=dataset.train_labels[train].to(device),
        validation_images=transformed(dataset.train_images[validation]),
        validation_labels=dataset.train_labels[validation].to(device),
        test_images=transformed(dataset.test_images),
        test_labels=dataset.test_labels.to(device),
    )


@final
class RealBatches:
    """Augmented mini-batches of real images, each a pure function of the step it is for.

    The training set is gone through in a new random order every epoch; what is left over at the
    end of an epoch is dropped.

    Args:
        images: float32 [N, C, H, W].
        labels: int64 [N].
        size: Images in a batch; N if it is more than that.
        augmentation: Applied to every batch.
        key: The randomness of order and augmentation.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, size: int, augmentation: Augmentation, key: Key
    ) -> None:
        self.images, self.labels = images, labels
        self.size = min(size, len(images))
        self.augmentation = augmentation
        self.key = key
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch (images, labels) of outer step `step`."""
        epoch, position = divmod(step, len(self.images) // self.size)
        if epoch != self._epoch:
            generator = self.key.generator("epoch", epoch)
            order = torch.randperm(len(self.images), generator=generator, device=generator.device)
            self._epoch, self._order = epoch, order.to(self.images.device)
        index = self._order[position * self.size : (position + 1) * self.size]
        images = self.augmentation(self.images[index], self.key.generator("augmentation", step))
        return images, self.labels[index]
