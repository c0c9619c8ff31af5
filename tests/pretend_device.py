"""A device that is not there: it computes on the CPU, and refuses what a real one refuses.

Tensors on it say that they are elsewhere. As on CUDA, an operation on tensors of two devices
raises, unless one is a number, and so does a draw on the device by a generator of the host. What
waits for the device, or copies from it to the host, is counted.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
_Generator = torch.Generator
_generators: dict[int, torch.Generator] = {}
#: What waits on CUDA for what it computes, for its result is a number or has a size that depends.
WAITS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
}
#: Of these operations, arguments may lie on the host while others are on the device.
MIXED = {
    aten.copy_.default,
    aten._to_copy.default,
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class Elsewhere(torch.Tensor):
    """A tensor on the pretend device; `here` is where it truly is."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> "Elsewhere":
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            layout=here.layout,
            device=torch.device("pretend", 0),
        )
        made.here = here
        return made

    def __init__(self, here: torch.Tensor) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})

    def tolist(self) -> Any:
        _counts["tolist"] += 1
        return self.here.tolist()


class GeneratorElsewhere(torch.Generator):
    """Draws what one of the host draws, for the device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("pretend", 0)


class _OfEither(type(torch.Generator)):
    def __instancecheck__(cls, found: object) -> bool:
        return isinstance(found, _Generator)


class _EitherGenerator(torch.Generator, metaclass=_OfEither):
    """Stands for `torch.Generator`, as a class, since annotations name it."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:  # type: ignore[misc]
        if torch.device(device).type != "pretend":
            return _Generator(device)
        made = GeneratorElsewhere()
        # PyTorch hands on what it wraps anew, so they are known by their address, and kept.
        _generators[made._cdata] = made  # type: ignore[attr-defined]
        return made


class Module(backend_registration._DummyBackendModule):
    """What PyTorch asks of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Pretending(TorchDispatchMode):
    """While it is active, tensors can be made on the device `pretend`."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})


_kernels = torch.library.Library("aten", "IMPL")


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Elsewhere:
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> Any:
    _here(target).copy_(_here(source))
    return target


#: How often what was waited for or copied, by operation.
_counts: Counter[str] = Counter()


@contextmanager
def pretended() -> Iterator[tuple[torch.device, Counter[str]]]:
    """The device, and how often it was waited for, by operation."""
    _counts.clear()
    _generators.clear()
    with Pretending(), mock.patch.object(torch, "Generator", _EitherGenerator):
        yield torch.device("pretend", 0), _counts


def _run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat = tree_flatten((args, kwargs))[0]
    elsewhere = [each for each in flat if isinstance(each, Elsewhere)]
    asked = kwargs.get("device")
    to_device = asked is not None and torch.device(asked).type == "pretend"
    if not elsewhere and not to_device:
        return op(*args, **kwargs)
    if op not in MIXED:
        for each in flat:
            if isinstance(each, torch.Tensor) and not isinstance(each, Elsewhere) and each.dim():
                raise RuntimeError(f"{op}: tensors on pretend:0 and on {each.device}")
    if any(isinstance(x, _Generator) and x._cdata not in _generators for x in flat):  # type: ignore[attr-defined]
        raise RuntimeError(f"{op}: a generator of the host draws on pretend:0")
    from_device = bool(elsewhere) and asked is not None and not to_device
    if op in WAITS or from_device or (op is aten.copy_.default and type(args[0]) is not Elsewhere):
        _counts[str(op)] += 1
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if op is aten._to_copy.default:
        kwargs.pop("non_blocking", None)
    known = {id(each.here): each for each in elsewhere}
    found = op(*tree_map(_here, args), **tree_map(_here, kwargs))
    if from_device or (op is aten.copy_.default and not isinstance(args[0], Elsewhere)):
        return args[0] if op is aten.copy_.default else found
    return tree_map(lambda x: known[id(x)] if id(x) in known else _there(x), found)


def _here(value: Any) -> Any:
    return value.here if isinstance(value, Elsewhere) else value


def _there(value: Any) -> Any:
    return Elsewhere(value) if isinstance(value, torch.Tensor) else value


# PyTorch counts its devices when it first differentiates, so this module must be imported before.
backend_registration._setup_privateuseone_for_python_backend("pretend", Module())
# Indexing by a list makes a tensor on the device behind the back of every mode.
_kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
_kernels.impl("_copy_from", _copy_from, "PrivateUse1")
