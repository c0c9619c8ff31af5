"""Images stored as they are."""

from collections.abc import Mapping
from typing import final

from torch import Tensor

from dd.synthetic.parameterisation import Parameterisation, norms_of


@final
class Pixels(Parameterisation):
    """Every image is stored as it is: `images`, float32 [K·I, C, H, W]."""

    lossless = True

    def encode(self, images: Tensor, num_classes: int) -> dict[str, Tensor]:
        return {"images": images}

    def decode(self, stored: Mapping[str, Tensor], index: Tensor | None = None) -> Tensor:
        images = stored["images"]
        # Decoded, as by every other parameterisation: a batch that is the outer variable itself has
        # its derivatives added up in another order, which changes their last bits.
        return images.view_as(images) if index is None else images[index]

    def project_(self, stored: Mapping[str, Tensor]) -> None:
        images = stored["images"]
        images.div_(norms_of(images).view(-1, 1, 1, 1))
