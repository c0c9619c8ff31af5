"""Differentiable Siamese Augmentation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

import torch
from torch import Tensor

from dd.augmentation import families
from dd.augmentation.base import Augmentation


def _color(images: Tensor, generator: torch.Generator) -> Tensor:
    images = families.brightness(images, generator, ratio=1.0)
    images = families.saturation(images, generator, ratio=2.0)
    return families.contrast(images, generator, ratio=0.5)


_FAMILIES: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = MappingProxyType(
    {
        "color": _color,
        "crop": lambda images, generator: families.crop(images, generator, padding=0.125),
        "cutout": lambda images, generator: families.cutout(images, generator, fraction=0.5),
        "flip": lambda images, generator: families.flip(images, generator, probability=0.5),
        "scale": lambda images, generator: families.scale(images, generator, ratio=1.2),
        "rotate": lambda images, generator: families.rotate(images, generator, degrees=15.0),
    }
)


@final
@dataclass(frozen=True)
class DSA(Augmentation):
    """Draws one family a call, evenly, and applies it with fresh parameters for each image.

    The families, at their published strengths: color (brightness 1, then saturation 2, then
    contrast 0.5), crop (padding 0.125), cutout (0.5), flip (0.5), scale (1.2), rotate (±15°).
    The formulas are in `dd.augmentation.families`.

    Source: Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML
    2021 (arXiv 2102.08259). This is the form in which training and trajectory matching use it;
    the "siamese" form, one set of parameters shared by a real and a synthetic batch, is not here.

    Attributes:
        strategy: The families to draw from, joined by underscores.

    Raises:
        ValueError: `strategy` names a family that does not exist.
    """

    strategy: str = "color_crop_cutout_flip_scale_rotate"

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, str):
            raise ValueError(f"strategy={self.strategy!r}: it must be names of families, in a text")
        for name in self.strategy.split("_"):
            if name not in _FAMILIES:
                raise ValueError(
                    f"strategy is {self.strategy!r}, with the unknown family {name!r}; "
                    f"it must join names out of {', '.join(_FAMILIES)} by underscores"
                )

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        names = self.strategy.split("_")
        choice = torch.randint(len(names), (), device=generator.device, generator=generator)
        return _FAMILIES[names[int(choice.item())]](images, generator)
