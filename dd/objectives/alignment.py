"""Alignment of synthetic with real images by class prototypes of their features."""

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from bilevel import ConfigurationError
from bilevel.checks import check_choice, check_instance, check_integer, check_number
from dd.objectives.experts import Experts


@final
class PrototypeAlignment:
    """A term of the outer loss: how far synthetic class prototypes are from the real ones.

        λ · (L_global + L_local),    L = Σ_c (N_c / N) · ‖P_c − Q_c‖² / V

    P_c is the mean feature of the N_c real images of class c in the outer batch of N, Q_c that of
    the synthetic images made for class c, and V the mean squared distance of all these features
    from their mean: the unit, which makes λ mean the same for every layer. The features are the
    map [d, h, w] that a layer of the network makes of an image, averaged over the image for
    L_global, and over each of n×n patches, at its place, for L_local. Without patches there is no
    L_local. θ_stop and V are held constant, so that the term has a derivative in the synthetic
    images alone.

    The layer sees whole images, of whose map the patches are cut. Given a patch alone, a layer
    that normalises over its few pixels makes nearly the same of every patch.

    With `MicroBatches`, prototypes and V are those of each piece. As classes weigh by their share
    of it, the derivative is that of the whole batch but for V. The graph of all synthetic images
    of the aligned classes is in memory at once: of ConvNet-4 of width 128, 6 MiB for an image of
    64×64.

    Args:
        weight: λ > 0. The term's gradient reaches the images at once, and is far larger than what
            the cross-entropy's leaves behind a window: with λ = 1 nothing else is learned.
        layer: Name of the layer of the network whose outputs are the maps, in a pass through all of
            it; "features" is all of a ConvNet but its classifier.
        parts: Which of L_global and L_local are in the sum: "global", "local" or both.
        classes_per_step: How many random classes an outer step aligns, or all if there are fewer;
            the sums over them are scaled up, so that the term is that of all classes on average,
            but for V. Default: all.
        experts: Take the features of the first of these networks, trained on the real images by
            `python -m dd.experts`, after its last snapshot. Default: of the inner network, with its
            θ_stop.

    Raises:
        ValueError: An argument outside its range.

    Source: the alignment term of patch-wise semantic preservation in AT-BPTT (arXiv 2510.04838);
    the distance, its unit, the layer and λ are our own choice, as the paper's are not published.
    """

    def __init__(
        self,
        weight: float = 0.01,
        layer: str = "features",
        parts: Sequence[str] = ("global", "local"),
        classes_per_step: int | None = None,
        experts: Experts | None = None,
    ) -> None:
        self.weight = check_number("weight", weight, above=0)
        if not isinstance(layer, str) or not layer:
            raise ConfigurationError(
                f"layer={layer!r}: it must be the name of a layer of the network"
            )
        self.layer = layer
        if not isinstance(parts, (list, tuple)) or not parts:
            raise ConfigurationError(f"parts={parts!r}: it must be a list of 'global' and 'local'")
        self.parts = tuple(check_choice("parts", part, ("global", "local")) for part in parts)
        self.classes_per_step = classes_per_step
        if classes_per_step is not None:
            check_integer("classes_per_step", classes_per_step)
        self.experts = experts
        if experts is not None:
            check_instance("experts", experts, Experts, "@Experts() with ()")

    def check(
        self, network: nn.Module, image_shape: tuple[int, ...], patches_per_side: int
    ) -> None:
        """Refuse a network without such a layer, or with a map that n×n patches do not fit.

        Args:
            network: The module.
            image_shape: (C, H, W) with H = W.
            patches_per_side: n.

        Raises:
            ValueError: Naming what does not fit.
        """
        if self.parts == ("local",) and patches_per_side == 1:
            raise ConfigurationError(
                "parts=('local',): images of patches_per_side=1 have no such part"
            )
        names = [name for name, _ in network.named_modules() if name]
        if self.layer not in names:
            raise ConfigurationError(f"layer={self.layer!r}: the network has {', '.join(names)}")
        params = dict(network.named_parameters())
        shape = tuple(self._maps(network, params, torch.zeros(1, *image_shape)).shape)
        if len(shape) != 4 or shape[3] != shape[2]:
            raise ConfigurationError(
                f"layer={self.layer!r}: it makes {list(shape[1:])} of an image; it must be a map, "
                "[d, h, h]"
            )
        if shape[2] % patches_per_side:
            raise ConfigurationError(
                f"patches_per_side={patches_per_side}: the layer {self.layer!r} makes "
                f"{list(shape[1:])} of an image, whose sides must be a multiple of that"
            )

    def __call__(
        self,
        network: nn.Module,
        params: Mapping[str, Tensor],
        real: tuple[Tensor, Tensor],
        synthetic: tuple[Tensor, Tensor],
        classes: Tensor,
        num_classes: int,
        patches_per_side: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The term, and its unweighted parts `alignment_global` and `alignment_local`.

        Args:
            network: The module whose layer makes the features.
            params: Of the network that makes them, by name.
            real: Images [N, C, H, W] and their classes, int64 [N].
            synthetic: The same, of what is learned of the aligned classes.
            classes: Those that are aligned, int64 [k], each once.
            num_classes: K.
            patches_per_side: n.
        """
        with torch.no_grad():
            real_maps = self._maps(network, params, real[0])
        maps = self._maps(network, params, synthetic[0])
        shares = _members(real[1], classes, maps.dtype).mean(1) * (num_classes / len(classes))

        def distance(patches: int) -> Tensor:
            real_features, features = (
                F.avg_pool2d(each, each.shape[2] // patches).flatten(1)
                for each in (real_maps, maps)
            )
            difference = _prototypes(real_features, real[1], classes) - _prototypes(
                features, synthetic[1], classes
            )
            together = torch.cat([real_features, features.detach()])
            scatter = (together - together.mean(0)).square().sum(1).mean()
            # Where all features are the same, so are the prototypes: 0, not 0/0.
            unit = scatter.clamp_min(torch.finfo(maps.dtype).tiny)
            return shares @ difference.square().sum(1) / unit

        parts = {}
        if "global" in self.parts:
            parts["alignment_global"] = distance(1)
        if "local" in self.parts and patches_per_side > 1:
            parts["alignment_local"] = distance(patches_per_side)
        return self.weight * torch.stack(list(parts.values())).sum(), parts

    def _maps(self, network: nn.Module, params: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """The layer's output as the network takes images, [N, d, h, h]; `params` are constants."""
        outputs: list[Tensor] = []
        constants = {name: value.detach() for name, value in params.items()}
        layer = network.get_submodule(self.layer)
        hook = layer.register_forward_hook(lambda module, given, output: outputs.append(output))
        try:
            functional_call(network, constants, (images,))
        finally:
            hook.remove()
        if not outputs:
            raise ConfigurationError(
                f"layer={self.layer!r}: the network has it, but makes no use of it"
            )
        return outputs[-1]


def _members(labels: Tensor, classes: Tensor, dtype: torch.dtype) -> Tensor:
    """[k, N]: 1 where an image is of a class."""
    # Not one_hot, which waits for the device to check its argument, and so cannot be compiled.
    return (labels == classes[:, None]).to(dtype)


def _prototypes(features: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """The mean of features [N, d] over each class: [k, d], 0 where there is none."""
    # A matrix product, unlike index_add, adds up in the same order on every run.
    members = _members(labels, classes, features.dtype)
    return members @ features / members.sum(1, keepdim=True).clamp_min(1)
