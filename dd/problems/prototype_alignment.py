"""Alignment of synthetic with real images by class prototypes of their features."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from dd.checks import check_number
from dd.patches import split_patches


@final
class PrototypeAlignment:
    """A term of the outer loss: the distance between real and synthetic class prototypes.

        λ · (L_global + L_local),    L = Σ_c (N_c / N) · mean over features of (P_c − Q_c)²

    P_c is the mean feature of the N_c real images of class c in the outer batch of N, and Q_c that
    of the synthetic images made for class c. L_global takes the features of whole images, L_local
    those of every patch at its place, each patch given to the extractor on its own; without
    patches there is no L_local.

    The features are what one layer of the network gives at θ_stop, which is held constant: the
    term has a derivative in the synthetic images, none in θ. Classes weigh by their share of the
    real images, for which reason the derivative over `MicroBatches` is exactly that of the whole
    batch; the value is larger, by the scatter of the pieces' prototypes.

    The graph of all synthetic images is in memory at once.

    Args:
        weight: λ > 0.
        layer: Name of the network's layer that turns images into features; "features" is all of a
            ConvNet but its classifier.

    Raises:
        ValueError: An argument outside its range.

    Source: the alignment term of patch-wise semantic preservation in AT-BPTT (arXiv 2510.04838).
    The distance, the layer and λ are our own choice: the paper's are not published.
    """

    def __init__(self, weight: float = 1.0, layer: str = "features") -> None:
        check_number("weight", weight, above=0)
        if not isinstance(layer, str) or not layer:
            raise ValueError(f"layer={layer!r}: it must be the name of a layer of the network")
        self.weight = weight
        self.layer = layer

    def check(
        self, network: nn.Module, image_shape: tuple[int, ...], patches_per_side: int
    ) -> None:
        """Refuse a network that has no such layer, or patches that are too small for it.

        Args:
            network: The module.
            image_shape: (C, H, W).
            patches_per_side: n.

        Raises:
            ValueError: Naming what does not fit.
        """
        names = [name for name, _ in network.named_modules() if name]
        if self.layer not in names:
            raise ValueError(f"layer={self.layer!r}: the network has {', '.join(names)}")
        patches = split_patches(torch.zeros(1, *image_shape), patches_per_side)
        try:
            self.features(network, dict(network.named_parameters()), patches)
        except RuntimeError as error:
            raise ValueError(
                f"patches_per_side={patches_per_side}: the layer {self.layer!r} cannot take "
                f"patches of {patches.shape[2]}×{patches.shape[3]}: {error}"
            ) from error

    def __call__(
        self,
        network: nn.Module,
        params: Mapping[str, Tensor],
        real: tuple[Tensor, Tensor],
        synthetic: tuple[Tensor, Tensor],
        num_classes: int,
        patches_per_side: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The term, and its unweighted parts `alignment_global` and `alignment_local`.

        Args:
            network: The module whose layer makes the features.
            params: θ_stop, by name.
            real: Images [N, C, H, W] and their classes, int64 [N].
            synthetic: The same, of all that is learned.
            num_classes: K.
            patches_per_side: n.
        """

        def distance(patches: int) -> Tensor:
            """L over images cut into patches² parts."""

            def features(images: Tensor) -> Tensor:
                parts = self.features(network, params, split_patches(images, patches))
                return parts.unflatten(0, (len(images), -1)).flatten(1)

            with torch.no_grad():
                real_prototypes, counts = _prototypes(features(real[0]), real[1], num_classes)
            prototypes, _ = _prototypes(features(synthetic[0]), synthetic[1], num_classes)
            distances = (real_prototypes - prototypes).square().mean(1)
            return (counts / counts.sum()) @ distances

        parts = {"alignment_global": distance(1)}
        if patches_per_side > 1:
            parts["alignment_local"] = distance(patches_per_side)
        return self.weight * torch.stack(list(parts.values())).sum(), parts

    def features(self, network: nn.Module, params: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """What the layer makes of images [N, C, h, w]: [N, d], without a derivative in `params`."""
        prefix = f"{self.layer}."
        own = {
            name.removeprefix(prefix): value.detach()
            for name, value in params.items()
            if name.startswith(prefix)
        }
        output: Tensor = functional_call(network.get_submodule(self.layer), own, (images,))
        return output.flatten(1)


def _prototypes(features: Tensor, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The mean feature of each class [K, d], 0 where there is none, and how many there are [K]."""
    # A product with the one-hot matrix, unlike index_add, adds up in the same order on every run.
    members = F.one_hot(classes, num_classes).to(features.dtype)
    counts = members.sum(0)
    return members.T @ features / counts.clamp_min(1)[:, None], counts
