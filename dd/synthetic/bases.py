"""Images as combinations of bases that all classes share."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from bilevel import ConfigurationError
from bilevel.checks import check_integer, check_number
from dd.synthetic.parameterisation import Parameterisation, norms_of
from dd.synthetic.scaling import check_divides, downscaled, upscaled


@final
class Bases(Parameterisation):
    """Every image is a combination of R bases, which all images of all classes share.

        x_{c,j} = U Σ_r a_{c,j,r} b_r        U: bilinear upsampling by f

    Stored are `bases`, float32 [R, C, H/f, W/f], and `coefficients`, float32 [K, J, R]. A class has
    as many images, J, as fit into the floats of I plain ones, with their labels if these are
    learned: at one image per class of CIFAR-10 36 bases of half size leave room for 8 images of
    each class, 16 for 115. `SyntheticDataset.batch_per_class` says how many of them an inner step
    has, and so what it costs.

    The start is the best such combination of given images: the singular value decomposition of
    all of them at 1/f of their size. Bases start with the root mean square of these, so that
    `Distiller.image_lr` means for them what it means for images, and the squares of the R
    coefficients of an image add up to about 1.

    Args:
        number: R.
        factor: F.
        coefficient_lr: The outer optimizer's rate for the coefficients; that for the bases is
            `Distiller.image_lr`.

    Raises:
        ConfigurationError: An argument outside its range; from `per_class`, if H or W is no
            multiple of f, or the bases leave no room for at least R images, or there are more of
            them than one has values.

    Source: Deng and Russakovsky, arXiv 2206.02916, where each image has a matrix of coefficients;
    the start and the rate are our own.
    """

    names = ("bases", "coefficients")
    multiple = None

    def __init__(self, number: int = 36, factor: int = 2, coefficient_lr: float = 1e-2) -> None:
        self.number = check_integer("number", number)
        self.factor = check_integer("factor", factor)
        self.coefficient_lr = check_number("coefficient_lr", coefficient_lr, above=0)

    def __str__(self) -> str:
        return f"Bases(number={self.number}, factor={self.factor})"

    def per_class(
        self, images_per_class: int, num_classes: int, image_shape: tuple[int, ...], extra: int
    ) -> int:
        check_divides("Bases", self.factor, image_shape)
        channels, height, width = image_shape
        values = channels * (height // self.factor) * (width // self.factor)
        room = num_classes * images_per_class * channels * height * width - self.number * values
        per_class = max(room, 0) // (num_classes * (self.number + extra))
        if self.number > min(values, num_classes * per_class):
            raise ConfigurationError(
                f"Bases with number={self.number}: beside them images_per_class={images_per_class} "
                f"has room for {num_classes * per_class} coded images, and one basis has {values} "
                "values; there must be at most as many bases as either"
            )
        return per_class

    def layout(self, stored: Mapping[str, Tensor], images_per_class: int) -> tuple[int, int]:
        classes, per_class, _ = stored["coefficients"].shape
        return classes, per_class

    def encode(self, images: Tensor, num_classes: int) -> dict[str, Tensor]:
        small = downscaled(images, self.factor)
        left, scale, right = torch.linalg.svd(small.flatten(1), full_matrices=False)
        size = float(torch.linalg.vector_norm(small)) / len(small) ** 0.5
        bases = size * right[: self.number]
        coefficients = left[:, : self.number] * scale[: self.number] / size
        return {
            "bases": bases.reshape(-1, *small.shape[1:]).contiguous(),
            "coefficients": coefficients.unflatten(0, (num_classes, -1)).contiguous(),
        }

    def decode(self, stored: Mapping[str, Tensor], index: Tensor | None = None) -> Tensor:
        bases, coefficients = stored["bases"], stored["coefficients"].flatten(0, 1)
        chosen = coefficients if index is None else coefficients[index]
        return upscaled((chosen @ bases.flatten(1)).unflatten(1, bases.shape[1:]), self.factor)

    def project_(self, stored: Mapping[str, Tensor]) -> None:
        norms = norms_of(self.decode(stored))
        # Shared by both, so that neither's rate loses its meaning.
        scale = norms.mean()
        stored["bases"].div_(scale)
        coefficients = stored["coefficients"]
        coefficients.mul_((scale / norms).view(*coefficients.shape[:2], 1))

    def rates(self, image_lr: float) -> dict[str, float]:
        return {"bases": image_lr, "coefficients": self.coefficient_lr}
