"""Directions of φ, along which forward mode differentiates."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel.random import Key


def unit_tangents(leaves: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The unit tangents of a list of tensors, one for each scalar in it."""
    tangents_of_all = []
    for index, leaf in enumerate(leaves):
        for position in range(leaf.numel()):
            tangents = [torch.zeros_like(other) for other in leaves]
            flat = torch.zeros(leaf.numel(), dtype=leaf.dtype, device=leaf.device)
            flat[position] = 1
            tangents[index] = flat.view(leaf.shape)
            tangents_of_all.append(tuple(tangents))
    return tangents_of_all


def random_signs(leaves: Sequence[Tensor], count: int, key: Key) -> list[tuple[Tensor, ...]]:
    """Tangents with entries of 1 and −1, each as likely as the other."""

    def signs(leaf: Tensor, generator: torch.Generator) -> Tensor:
        bits = torch.randint(2, leaf.shape, generator=generator, device=leaf.device)
        return (2 * bits - 1).to(leaf.dtype)

    return [
        tuple(
            signs(leaf, key.generator(number, index, device=leaf.device))
            for index, leaf in enumerate(leaves)
        )
        for number in range(count)
    ]
