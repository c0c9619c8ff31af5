"""How far apart the features of two sets of images are."""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from bilevel.checks import check_integer, check_number


class Discrepancy(ABC):
    """A distance between the distributions of real and of synthetic features, class by class."""

    @abstractmethod
    def __call__(
        self, real: Tensor, real_members: Tensor, found: Tensor, members: Tensor, seed: int
    ) -> Tensor:
        """The sum over k classes, a scalar that is differentiated by `found`.

        Args:
            real: Features of real images, [N, d], constants.
            real_members: Which of them are of which class, 0 or 1, [k, N], at least one of each.
            found: Features of synthetic images, [M, d].
            members: Likewise, [k, M].
            seed: Of what is drawn.
        """


@final
class MeanFeatures(Discrepancy):
    """The squared distance of the means: ‖E_x f − E_s f‖² (DM, arXiv 2110.04181, equation 4)."""

    def __call__(
        self, real: Tensor, real_members: Tensor, found: Tensor, members: Tensor, seed: int
    ) -> Tensor:
        return (_means(real, real_members) - _means(found, members)).square().sum()


@final
class CharacteristicFunctions(Discrepancy):
    """The distance of the characteristic functions Φ(ω) = E exp(i⟨ω, f⟩) at random frequencies:

        E_ω √( α (|Φ_x| − |Φ_s|)² + (1 − α) · 2 |Φ_x| |Φ_s| (1 − cos(∠Φ_x − ∠Φ_s)) )

    which sees all moments of the features where `MeanFeatures` sees the first. ω is normal, of
    standard deviation `bandwidth` over the spread of the step's real features, √Σ_d Var f_d; NCFM
    also trains a network to choose it, and takes the features of trained networks, which this does
    not. With α = 1/2 the root is |Φ_x − Φ_s|/√2.

    Args:
        frequencies: How many ω are drawn in every outer step.
        amplitude: α, between 0 and 1: the weight of the amplitudes beside that of the phases.
        bandwidth: Above 0; small, it compares means; large, single images.

    Raises:
        ConfigurationError: An argument outside its range.

    Source: Wang et al., NCFM, arXiv 2502.20653, equations 4 to 6.
    """

    def __init__(
        self, frequencies: int = 1024, amplitude: float = 0.5, bandwidth: float = 1.0
    ) -> None:
        self.frequencies = check_integer("frequencies", frequencies)
        self.amplitude = check_number("amplitude", amplitude, minimum=0, maximum=1)
        self.bandwidth = check_number("bandwidth", bandwidth, above=0)

    def __call__(
        self, real: Tensor, real_members: Tensor, found: Tensor, members: Tensor, seed: int
    ) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(real.shape[1], self.frequencies, generator=generator).to(real)
        spread = real.var(0, correction=0).sum().sqrt()
        drawn = drawn * (self.bandwidth / torch.where(spread > 0, spread, 1))
        x_cos, x_sin = _characteristic(real @ drawn, real_members)
        s_cos, s_sin = _characteristic(found @ drawn, members)
        # A root has no derivative at 0, where an amplitude or the whole may lie.
        least = torch.finfo(real.dtype).eps
        of_x = (x_cos.square() + x_sin.square()).clamp_min(least).sqrt()
        of_s = (s_cos.square() + s_sin.square()).clamp_min(least).sqrt()
        phases = 2 * (of_x * of_s - (x_cos * s_cos + x_sin * s_sin))
        squared = self.amplitude * (of_x - of_s).square() + (1 - self.amplitude) * phases
        return squared.clamp_min(least).sqrt().mean(1).sum()


def _characteristic(angles: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Φ, real and imaginary, for each class and frequency: [k, F] each."""
    return _means(angles.cos(), members), _means(angles.sin(), members)


def _means(features: Tensor, members: Tensor) -> Tensor:
    """The mean of features [N, d] over each class: [k, d]."""
    # A matrix product, unlike index_add, adds up in the same order on every run.
    return members @ features / members.sum(1, keepdim=True)
