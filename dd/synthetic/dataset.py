"""The synthetic set: what is learned, how it starts, and the mini-batches drawn from it."""

from typing import final

import torch
from torch import Tensor

from bilevel import ConfigurationError
from bilevel.checks import check_choice, check_flag, check_integer
from dd.data.stored_images import Images
from dd.synthetic.patches import compose_patches, split_patches


@final
class SyntheticDataset:
    """A small labelled set of images, `images_per_class` for every class, ordered by class.

    Its outer variables are a dict: `images`, float32 [K·I·n², C, H/n, W/n], and with learned labels
    `labels`, float32 [K·I, K], which start one-hot, are kept ≥ 0, and are never normalised.

    What is learned of an image are its n×n patches, as `split_patches` cuts them. With n = 1 they
    are the images themselves; with more, each patch has its own norm where norms are projected, and
    its own bound where `MovingAverageRowClip` clips their hypergradient.

    Args:
        images_per_class: I ≥ 1.
        start: "noise", standard normal; or "real", random training images of each class.
        projection: Scale every patch to L2 norm 1/n, and so every image to 1: "none", at the
            "start" only (RaT-BPTT), or at "every_step" (AT-BPTT++).
        learn_labels: Learn soft labels beside the images.
        classes_per_step: How many random classes an inner batch holds, or all if there are fewer;
            default: all.
        batch_per_class: How many random images of each of these; default: all.
        patches_per_side: N; 4 for images of 64×64 and more in patch-wise semantic preservation
            (AT-BPTT, arXiv 2510.04838).

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
            if batch_per_class > images_per_class:
                raise ConfigurationError(
                    f"batch_per_class={batch_per_class}: there are only "
                    f"images_per_class={images_per_class}"
                )
        self.patches_per_side = check_integer("patches_per_side", patches_per_side)

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
            ConfigurationError: A real start finds too few images, or images cannot be cut into n×n
                patches.
        """
        if self.start == "real":
            chosen = random_subset(real_labels, self.images_per_class, num_classes, generator)
            images = real_images[chosen].clone()
        else:
            shape = (num_classes * self.images_per_class, *real_images.shape[1:])
            images = torch.randn(shape, generator=generator, device=generator.device)
            images = images.to(real_images.device)
        try:
            outer = {"images": split_patches(images, self.patches_per_side)}
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
        if self.learn_labels:
            outer["labels"] = torch.nn.functional.one_hot(
                self.hard_labels(num_classes, images.device), num_classes
            ).to(images.dtype)
        if self.projection != "none":
            self._project_(outer["images"])
        return {name: value.requires_grad_() for name, value in outer.items()}

    def hard_labels(self, num_classes: int, device: torch.device | str = "cpu") -> Tensor:
        """The class of every image, int64 [K·I]."""
        return torch.arange(num_classes, device=device).repeat_interleave(self.images_per_class)

    def images(self, outer: dict[str, Tensor]) -> Tensor:
        """The whole images, [K·I, C, H, W], differentiable in `outer`."""
        return compose_patches(outer["images"], self.patches_per_side)

    def labels(self, outer: dict[str, Tensor]) -> Tensor:
        """The learned labels, or the hard ones."""
        if "labels" in outer:
            return outer["labels"]
        return self.classes(outer)

    def classes(self, outer: dict[str, Tensor]) -> Tensor:
        """The class of every image, whatever its label has become: int64 [K·I]."""
        return self.hard_labels(self._num_classes(outer), outer["images"].device)

    def of_classes(self, outer: dict[str, Tensor], classes: Tensor) -> tuple[Tensor, Tensor]:
        """The whole images of some classes, int64 [k], and the class of each; differentiable."""
        within = torch.arange(self.images_per_class, device=classes.device)
        index = (classes[:, None] * self.images_per_class + within).flatten()
        return self._chosen(outer, index), classes.repeat_interleave(self.images_per_class)

    def batch(self, outer: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A class-balanced mini-batch (images, labels), differentiable in `outer`."""
        labels = self.labels(outer)
        num_classes = self._num_classes(outer)
        classes = min(self.classes_per_step or num_classes, num_classes)
        per_class = self.batch_per_class or self.images_per_class
        if classes == num_classes and per_class == self.images_per_class:
            return self.images(outer), labels
        device = generator.device
        chosen = torch.randperm(num_classes, generator=generator, device=device)[:classes]
        order = torch.rand(classes, self.images_per_class, generator=generator, device=device)
        within = order.argsort(dim=1)[:, :per_class]
        index = (chosen[:, None] * self.images_per_class + within).flatten()
        index = index.to(labels.device, non_blocking=True)
        return self._chosen(outer, index), labels[index]

    @torch.no_grad()
    def constrain_(self, outer: dict[str, Tensor]) -> None:
        """What holds after every outer step: labels ≥ 0, and unit norms where asked for."""
        if "labels" in outer:
            outer["labels"].clamp_(min=0)
        if self.projection == "every_step":
            self._project_(outer["images"])

    def _chosen(self, outer: dict[str, Tensor], index: Tensor) -> Tensor:
        by_image = outer["images"].unflatten(0, (-1, self.patches_per_side**2))
        return compose_patches(by_image[index].flatten(0, 1), self.patches_per_side)

    def _num_classes(self, outer: dict[str, Tensor]) -> int:
        return len(outer["images"]) // (self.patches_per_side**2 * self.images_per_class)

    def _project_(self, patches: Tensor) -> None:
        norms = torch.linalg.vector_norm(patches.flatten(1), dim=1).clamp_min(1e-12)
        patches.div_(norms.mul_(self.patches_per_side).view(-1, 1, 1, 1))


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
