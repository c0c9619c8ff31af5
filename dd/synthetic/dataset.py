"""The synthetic set: what is learned, how it starts, and the mini-batches drawn from it."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from bilevel import ConfigurationError
from bilevel.checks import check_choice, check_flag, check_instance, check_integer
from dd.data.stored_images import Images
from dd.synthetic.parameterisation import Parameterisation
from dd.synthetic.patches import Patches
from dd.synthetic.pixels import Pixels


@final
class SyntheticDataset:
    """A small labelled set of images, as many for every class, ordered by class.

    Its outer variables are a dict: what the parameterisation stores of the images, which is
    `images`, float32 [K·I, C, H, W], by default; and with learned labels `labels`, float32
    [K·J, K], which start one-hot, are kept ≥ 0, and are never normalised. J, the number of images
    of a class that are decoded from the stored ones, is I by default.

    Args:
        images_per_class: I ≥ 1, the size of the set: what is stored of its images takes the floats
            of at most I whole images for each class.
        start: "noise", standard normal; or "real", random training images of each class.
        projection: Scale every image, or each of its patches to 1/n, to L2 norm 1: "none", at the
            "start" only (RaT-BPTT), or at "every_step" (AT-BPTT++).
        learn_labels: Learn soft labels beside the images.
        classes_per_step: How many random classes an inner batch holds, or all if there are fewer;
            default: all.
        batch_per_class: How many random ones of the J images of each of these; default: all.
        patches_per_side: N; short for the parameterisation `Patches`.
        parameterisation: What is stored of the images: `Pixels`, the default, `Patches`,
            `MultiFormation` or `Bases`.

    Raises:
        ValueError: An argument outside its range.
    """

    def __init__(
        self,
        images_per_class: int = 1,
        start: str = "noise",
        projection: str = "none",
        learn_labels: bool = False,
        classes_per_step: int | None = None,
        batch_per_class: int | None = None,
        patches_per_side: int = 1,
        parameterisation: Parameterisation | None = None,
    ) -> None:
        self.images_per_class = check_integer("images_per_class", images_per_class)
        self.start = check_choice("start", start, ("noise", "real"))
        self.projection = check_choice("projection", projection, ("none", "start", "every_step"))
        self.learn_labels = check_flag("learn_labels", learn_labels)
        self.classes_per_step = classes_per_step
        if classes_per_step is not None:
            check_integer("classes_per_step", classes_per_step)
        self.batch_per_class = batch_per_class
        if batch_per_class is not None:
            check_integer("batch_per_class", batch_per_class)
        self.parameterisation = _checked_parameterisation(parameterisation, patches_per_side)
        if self.parameterisation.multiple is not None:
            self._check_batch(images_per_class * self.parameterisation.multiple)

    def notes(self, labels: Tensor, class_names: Sequence[str]) -> list[str]:
        """What one should know before the first outer step, from all training labels."""
        counts = torch.bincount(labels, minlength=len(class_names))
        least = int(counts.min())
        if self.images_per_class <= least:
            return []
        return [
            f"images_per_class={self.images_per_class} is more than the {least} training images of "
            f"class {class_names[int(counts.argmin())]}: random real images are then all of them"
        ]

    def create(
        self, real_images: Images, real_labels: Tensor, num_classes: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """New outer variables on the device of `real_images`, leaves that require gradients.

        Args:
            real_images: Transformed training images, float32 [N, C, H, W].
            real_labels: int64 [N].
            num_classes: K.
            generator: Source of randomness.

        Raises:
            ConfigurationError: A real start finds too few images, or images of this shape, or so
                few of them, cannot be stored by this parameterisation.
        """
        shape = tuple(real_images.shape[1:])
        extra = num_classes if self.learn_labels else 0
        per_class = self.parameterisation.per_class(
            self.images_per_class, num_classes, shape, extra
        )
        self._check_batch(per_class)
        if self.start == "real":
            chosen = random_subset(real_labels, per_class, num_classes, generator)
            images = real_images[chosen].clone()
        else:
            images = torch.randn(
                (num_classes * per_class, *shape), generator=generator, device=generator.device
            )
            images = images.to(real_images.device)
        outer = self.parameterisation.encode(images, num_classes)
        if self.learn_labels:
            outer["labels"] = torch.nn.functional.one_hot(self.classes(outer), num_classes).to(
                images.dtype
            )
        if self.projection != "none":
            self.parameterisation.project_(outer)
        return {name: value.requires_grad_() for name, value in outer.items()}

    @property
    def patches_per_side(self) -> int:
        """N, where every image is learned as n×n patches."""
        return self.parameterisation.patches_per_side

    def stored(self, outer: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is stored of the images."""
        return {name: outer[name] for name in self.parameterisation.names}

    def images(self, outer: dict[str, Tensor]) -> Tensor:
        """The whole images, [K·J, C, H, W], differentiable in `outer`."""
        return self.parameterisation.decode(outer)

    def labels(self, outer: dict[str, Tensor]) -> Tensor:
        """The learned labels, or the hard ones."""
        if "labels" in outer:
            return outer["labels"]
        return self.classes(outer)

    def classes(self, outer: dict[str, Tensor]) -> Tensor:
        """The class of every image, whatever its label has become: int64 [K·J]."""
        num_classes, per_class = self._layout(outer)
        device = outer[self.parameterisation.names[0]].device
        return torch.arange(num_classes, device=device).repeat_interleave(per_class)

    def of_classes(self, outer: dict[str, Tensor], classes: Tensor) -> tuple[Tensor, Tensor]:
        """The whole images of some classes, int64 [k], and the class of each; differentiable."""
        _, per_class = self._layout(outer)
        within = torch.arange(per_class, device=classes.device)
        index = (classes[:, None] * per_class + within).flatten()
        return self.parameterisation.decode(outer, index), classes.repeat_interleave(per_class)

    def batch(self, outer: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A class-balanced mini-batch (images, labels), differentiable in `outer`."""
        labels = self.labels(outer)
        num_classes, available = self._layout(outer)
        classes = min(self.classes_per_step or num_classes, num_classes)
        per_class = self.batch_per_class or available
        if classes == num_classes and per_class == available:
            return self.images(outer), labels
        device = generator.device
        chosen = torch.randperm(num_classes, generator=generator, device=device)[:classes]
        order = torch.rand(classes, available, generator=generator, device=device)
        within = order.argsort(dim=1)[:, :per_class]
        index = (chosen[:, None] * available + within).flatten()
        index = index.to(labels.device, non_blocking=True)
        return self.parameterisation.decode(outer, index), labels[index]

    @torch.no_grad()
    def constrain_(self, outer: dict[str, Tensor]) -> None:
        """What holds after every outer step: labels ≥ 0, and unit norms where asked for."""
        if "labels" in outer:
            outer["labels"].clamp_(min=0)
        if self.projection == "every_step":
            self.parameterisation.project_(outer)

    def _layout(self, outer: dict[str, Tensor]) -> tuple[int, int]:
        """The number of classes, and of images of each."""
        return self.parameterisation.layout(outer, self.images_per_class)

    def _check_batch(self, available: int) -> None:
        if self.batch_per_class is not None and self.batch_per_class > available:
            raise ConfigurationError(
                f"batch_per_class={self.batch_per_class}: images_per_class={self.images_per_class} "
                f"gives only {available} images of a class"
            )


def _checked_parameterisation(
    parameterisation: Parameterisation | None, patches_per_side: int
) -> Parameterisation:
    n = check_integer("patches_per_side", patches_per_side)
    if parameterisation is None:
        return Pixels() if n == 1 else Patches(n)
    check_instance("parameterisation", parameterisation, Parameterisation, "@Bases() with ()")
    if n != 1:
        raise ConfigurationError(
            f"patches_per_side={n}: with a parameterisation, it must be left at 1"
        )
    return parameterisation


def random_subset(
    labels: Tensor,
    per_class: int,
    num_classes: int,
    generator: torch.Generator,
    or_all: bool = False,
) -> Tensor:
    """Indices of `per_class` random examples of each class, ordered by class.

    Args:
        labels: int64 [N].
        per_class: How many of each class.
        num_classes: K.
        generator: Source of randomness.
        or_all: Take all examples of a class that has fewer.

    Raises:
        ConfigurationError: A class has fewer examples than that, and not `or_all`.
    """
    chosen = []
    for label in range(num_classes):
        members = (labels == label).nonzero().flatten()
        if len(members) < per_class and not or_all:
            raise ConfigurationError(
                f"images_per_class={per_class}: class {label} has only {len(members)} real images"
            )
        order = torch.randperm(len(members), generator=generator, device=generator.device)
        chosen.append(members[order[:per_class].to(members.device)])
    return torch.cat(chosen)
