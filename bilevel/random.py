"""Keyed randomness: every draw comes from a generator derived from a seed and a path.

A step of the inner loop can then be run again and give the same bits: for recomputation in the
backward pass, for resuming, and for splitting work over processes.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel.errors import ConfigurationError, ProblemError


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
        if not isinstance(generator, torch.Generator | None):
            raise ConfigurationError(f"generator={generator!r}: it must be a torch.Generator")
        device = torch.device("cpu") if generator is None else generator.device
        seed = torch.randint(2**62, (), generator=generator, device=device)
        return cls(int(seed), device)


@final
class DrawsFrom(TorchDispatchMode):
    """Inside, in this thread, what would be drawn from PyTorch's global generators is drawn from
    others with one seed, which give what a global generator with that seed would.

    The global generators are neither used nor changed, so threads do not disturb each other. Draws
    for which the code names a generator are left as they are; NumPy's and Python's are their own.

    Args:
        seed: Of the generators, one for each device that occurs.

    Raises:
        ProblemError: (inside) An operation draws and takes no generator.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags or given.get("generator") is not None:
            return func(*args, **given)
        names = _arguments(func)
        if "generator" in names:
            if len(args) > names.index("generator"):  # given by position
                return func(*args, **given)
        else:
            func = _with_generator(func, names)
        return func(*args, **given, generator=self._generator(_device_of(args, given)))

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def _arguments(func: Any) -> list[str]:
    return [argument.name for argument in func._schema.arguments]


def _with_generator(func: Any, names: list[str]) -> Any:
    """The overload with the same arguments and a generator."""
    packet = func.overloadpacket
    for name in packet.overloads():
        overload = getattr(packet, name)
        others = _arguments(overload)
        if sorted(others) == sorted([*names, "generator"]):
            return overload
    raise ProblemError(
        f"an initialisation draws by {func}, which takes no generator, so that its draws could not "
        "be repeated: use another operation, such as Tensor.normal_"
    )


def _device_of(args: Any, kwargs: Mapping[str, Any]) -> torch.device:
    device = kwargs.get("device")
    if device is None:
        tensors = [value for value in args if isinstance(value, Tensor)]
        device = tensors[0].device if tensors else torch.get_default_device()
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device
