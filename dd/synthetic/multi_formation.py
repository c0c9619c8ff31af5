"""Several smaller images in the floats of one."""

from collections.abc import Mapping
from typing import final

from torch import Tensor

from bilevel.checks import check_integer
from dd.synthetic.parameterisation import Parameterisation, norms_of
from dd.synthetic.patches import compose_patches, split_patches
from dd.synthetic.scaling import check_divides, downscaled, upscaled


@final
class MultiFormation(Parameterisation):
    """Every stored image holds f×f images of 1/f its size, which are decoded by upsampling.

    Stored are `images`, float32 [K·I, C, H, W], cut into f×f cells row by row; each cell is
    upsampled bilinearly to [C, H, W]. A class so has J = I·f² images in the floats of I. With f = 1
    these are the images of `Pixels`.

    Args:
        factor: F.

    Raises:
        ConfigurationError: An argument outside its range; from `per_class`, if H or W is no
            multiple of f.

    Source: Kim et al., arXiv 2205.14959 (IDC), whose factor is 2 on CIFAR-10.
    """

    def __init__(self, factor: int = 2) -> None:
        self.factor = check_integer("factor", factor)
        self.multiple = self.factor**2
        self.lossless = self.factor == 1

    def __str__(self) -> str:
        return f"MultiFormation(factor={self.factor})"

    def per_class(
        self, images_per_class: int, num_classes: int, image_shape: tuple[int, ...], extra: int
    ) -> int:
        check_divides("MultiFormation", self.factor, image_shape)
        return super().per_class(images_per_class, num_classes, image_shape, extra)

    def encode(self, images: Tensor, num_classes: int) -> dict[str, Tensor]:
        return {"images": compose_patches(downscaled(images, self.factor), self.factor)}

    def decode(self, stored: Mapping[str, Tensor], index: Tensor | None = None) -> Tensor:
        cells = split_patches(stored["images"], self.factor)
        return upscaled(cells if index is None else cells[index], self.factor)

    def project_(self, stored: Mapping[str, Tensor]) -> None:
        cells = split_patches(stored["images"], self.factor)
        cells = cells / norms_of(self.decode(stored)).view(-1, 1, 1, 1)
        stored["images"].copy_(compose_patches(cells, self.factor))
