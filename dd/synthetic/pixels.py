"""Images stored as they are."""

from collections.abc import Mapping
from typing import final

from torch import Tensor

from dd.synthetic.parameterisation import Parameterisation


@final
class Pixels(Parameterisation):
    """Every image is stored as it is: `images`, float32 [K·I, C, H, W]."""

    lossless = True

    def encode(self, images: Tensor, num_classes: int) -> dict[str, Tensor]:
        return {"images": images}

    def decode(self, stored: Mapping[str, Tensor], index: Tensor | None = None) -> Tensor:
        return stored["images"] if index is None else stored["images"][index]
