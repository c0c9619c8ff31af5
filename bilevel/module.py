"""Using an `nn.Module` as the inner model."""

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from bilevel.errors import ProblemError
from bilevel.random import DrawsFrom


def fresh_parameters(
    module: nn.Module | Callable[[], nn.Module],
    generator: torch.Generator,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Newly initialised parameters for `module`, those that are trained.

    Of a function that builds the module, as in `fresh_parameters(lambda: Net(), generator)`, its
    own initialisation is used, whatever it is. Of a module, each layer's own `reset_parameters`;
    then what the module holds is looked at once, and refused where it is not what these draw,
    because a custom initialisation, or training, or loaded weights left it there. (A custom
    initialisation of a few entries, or one that draws nearly the same, can pass unnoticed.)

    Parameters with `requires_grad=False` are left out: `torch.func.functional_call(module, …)`
    then uses those of the module, so a pretrained part stays as it is and is not trained.

    The module is not changed, and PyTorch's global generators are neither used nor changed, so
    threads may call this at the same time. (Draws of NumPy and Python are their own.) They are made
    on the CPU, so that the same generator gives the same network on every device.

    Args:
        module: A module, or a function without arguments, or a class, that makes one.
        generator: Source of randomness; one integer is drawn from it.
        device: Where the parameters go; default: where the module's are.
        dtype: Their dtype; default: the module's.

    Returns:
        The parameters by name, as `torch.func.functional_call` takes them.

    Raises:
        ProblemError: A layer holds parameters to train and has no `reset_parameters`, or one of
            them is not what that draws; or there is nothing to train.
    """
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    if isinstance(module, nn.Module):
        _check_trainable(module)
        template = _blank(module)
        _draw(template, seed)
        check_own_initialisation(module, partial(_draw, _blank(module)))
        places = {name: parameter.device for name, parameter in module.named_parameters()}
    else:
        template = _built(module, seed)
        default = torch.get_default_device()
        places = {
            name: default if parameter.device.type == "cpu" else parameter.device
            for name, parameter in template.named_parameters()
        }
    return {
        name: parameter.detach().to(device=device or places[name], dtype=dtype)
        for name, parameter in template.named_parameters()
        if parameter.requires_grad
    }


def _built(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """What a function builds, drawing from `seed`."""
    if not callable(make):
        raise ProblemError(
            f"module is a {type(make).__name__}; it must be an nn.Module or a function without "
            "arguments that makes one"
        )
    with DrawsFrom(seed), torch.device("cpu"):
        module = make()
    if not isinstance(module, nn.Module):
        raise ProblemError(
            f"the function that was to build a module returned a {type(module).__name__}"
        )
    _check_trainable(module)
    return module


def _blank(module: nn.Module) -> nn.Module:
    """A copy on the CPU in which no parameter has a value yet."""
    blank = {
        id(p): nn.Parameter(torch.empty_like(p, device="cpu"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, blank)


def _draw(template: nn.Module, seed: int) -> nn.Module:
    """Have every layer draw its own initialisation from `seed`."""
    with DrawsFrom(seed):
        for name, layer, reset in resets_of(template):
            if reset is not None:
                reset()
            elif any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
                raise ProblemError(
                    f"layer {name or '(root)'!r} ({type(layer).__name__}) holds parameters but has "
                    "no reset_parameters(), so a fresh initialisation cannot be drawn for it: give "
                    "a function that builds the module, as in fresh_parameters(lambda: Net(), "
                    "generator)"
                )
    return template


def _check_trainable(module: nn.Module) -> None:
    if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters()):
        raise ProblemError(
            "the module has lazy layers, whose parameters have no shape yet: call it once first"
        )
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ProblemError(
            "the module has no parameter to train: it has none at all, or all of them have "
            "requires_grad=False, which fresh_parameters leaves as they are"
        )


def refuse_running_statistics(module: nn.Module, name: str = "module") -> None:
    """Raise `ProblemError` if a layer of `module` updates buffers while it trains.

    Running statistics make an inner step depend on more than (θ, batch), and change behind the
    back of a step that is run again, so the hypergradient would be silently wrong.
    """
    for path, layer in module.named_modules():
        if getattr(layer, "track_running_stats", False) and layer.training:
            raise ProblemError(
                f"{name}{'.' + path if path else ''} ({type(layer).__name__}) keeps running "
                "statistics, which an inner loop cannot carry: use GroupNorm or LayerNorm, or "
                "build the layer with track_running_stats=False; a layer that is not trained "
                "belongs in eval mode"
            )


#: Draws that parameters are compared with: so many of the whole module, at least 2, of so many
#: numbers in all; and of one parameter so many entries.
DRAWS = 8
NUMBERS = 2**17
ENTRIES = 2**14

#: Parameters that a layer would draw less often than this are not its own.
CHANCE = 1e-9

_Signature = tuple[tuple[int, int], ...]
_found_right: weakref.WeakKeyDictionary[nn.Module, _Signature] = weakref.WeakKeyDictionary()


def resets_of(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module, Any]]:
    """(name, layer, its own initialisation or None), children first, parts of frozen ones left out.

    A layer's own initialisation may overwrite that of its parts, so it comes after theirs.
    """
    for part, child in module.named_children():
        yield from resets_of(child, f"{name}.{part}" if name else part)
    if any(parameter.requires_grad for parameter in module.parameters()):
        reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        yield name, module, reset if callable(reset) else None


def check_own_initialisation(module: nn.Module, draw: Callable[[int], nn.Module]) -> None:
    """Raise unless the trained parameters of `module` look like what its layers draw.

    Constants are compared exactly, such as the ones of a norm. Of random ones, how their entries
    are distributed; a few entries tell little. Parameters that are not finite tell nothing.

    Args:
        module: The module as it is held.
        draw: Has every layer of a copy draw its own initialisation from a seed; gives the copy.

    Raises:
        ProblemError: One does not; the message names it and says what to do.
    """
    signature = tuple((id(p), p._version) for p in module.parameters())
    if _found_right.get(module) == signature:
        return
    held = {name: p for name, p in module.named_parameters() if p.requires_grad}
    count = sum(parameter.numel() for parameter in held.values())
    draws = [
        {name: p.detach().clone() for name, p in draw(seed).named_parameters()}
        for seed in range(max(2, min(DRAWS, NUMBERS // max(count, 1))))
    ]
    for name, parameter in held.items():
        value, *drawn = (
            each.detach().double().cpu().flatten()
            for each in (parameter, *(one[name] for one in draws))
        )
        if bool(torch.isfinite(value).all()) and not _is_likely(value, torch.stack(drawn)):
            raise ProblemError(
                f"the parameter {name!r} is not what its layer's reset_parameters() draws, so "
                "there is another initialisation, or it was trained or loaded, and a fresh draw "
                "would be a guess: give a function that builds the module, as in "
                "fresh_parameters(lambda: Net(), generator), and its own initialisation is used; "
                "a part that is to stay as it is, freeze with requires_grad_(False)"
            )
    _found_right[module] = signature


def _is_likely(value: Tensor, drawn: Tensor) -> bool:
    """Whether `value`, of n entries, may be one of the draws, one a row, that are given."""
    if bool((drawn == drawn[0]).all()):
        return torch.equal(value, drawn[0])
    stride = -(-len(value) // ENTRIES)
    value, pool = value[::stride], drawn[:, ::stride].flatten()
    if len(pool.unique()) > 0.9 * len(pool) and _repeats(value, pool):
        return False
    n, total = len(value), len(value) + len(pool)
    sizes, others = value.abs(), pool.abs()
    # The k largest of all n + N numbers are equally likely to be any k of them.
    larger, smaller = int((sizes > others.max()).sum()), int((others > sizes.max()).sum())
    distance = max(_distance(value, pool), _distance(sizes, others))
    chances = [
        (n / total) ** larger,
        (1 - n / total) ** smaller,
        2 * math.exp(-2 * distance**2 * n * (1 - n / total)),
    ]
    return min(chances) > CHANCE


def _repeats(value: Tensor, pool: Tensor) -> bool:
    """Whether numbers occur more than once, or 0 often, as they hardly ever do in draws."""
    often = len(value) > 1 and len(value.unique()) <= len(value) // 2
    return often or int((value == 0).sum()) > 0.1 * len(value) + int((pool == 0).sum())


def _distance(one: Tensor, other: Tensor) -> float:
    """Kolmogorov and Smirnov's: the largest difference of two distribution functions."""
    points = torch.cat([one, other])
    below = [
        torch.searchsorted(sample.sort().values, points, right=True).double() / len(sample)
        for sample in (one, other)
    ]
    return float((below[0] - below[1]).abs().max())
