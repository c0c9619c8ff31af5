"""Keyed randomness: every draw comes from a generator derived from a seed and a path.

A step of the inner loop can then be run again and give the same bits: for recomputation in the
backward pass, for resuming, and for splitting work over processes.
"""

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Key:
    """A seed from which independent, reproducible generators are derived by path.

    `Key(seed).generator("inner_batch", 3)` is the same generator whenever it is asked for, and
    independent (through BLAKE2b) of the one for any other path.

    Args:
        seed: Any Python integer.
        device: Where the derived generators draw.
    """

    seed: int
    device: torch.device = torch.device("cpu")

    def fold(self, *path: int | str) -> "Key":
        """The key at `path` below this one."""
        return Key(self._seed(path), self.device)

    def generator(self, *path: int | str, device: torch.device | None = None) -> torch.Generator:
        """A fresh generator for `path`, on `device` (default: the key's own)."""
        generator = torch.Generator(device=device or self.device)
        return generator.manual_seed(self._seed(path))

    def _seed(self, path: tuple[int | str, ...]) -> int:
        text = repr((self.seed, *path)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1

    @classmethod
    def draw(cls, generator: torch.Generator | None = None) -> "Key":
        """A key whose seed is one draw from `generator` (default: PyTorch's global one).

        Generators derived from the key live on the device of `generator`.
        """
        device = torch.device("cpu") if generator is None else generator.device
        seed = torch.randint(2**62, (), generator=generator, device=device)
        return cls(int(seed), device)
