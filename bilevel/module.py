"""Using an `nn.Module` as the inner model."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bilevel.errors import ProblemError


def fresh_parameters(
    module: nn.Module,
    generator: torch.Generator,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Newly initialised parameters for `module`, by each layer's own `reset_parameters`.

    Neither the module nor PyTorch's global generators are changed. The draws are made on the CPU,
    so that the same generator gives the same network on every device.

    Args:
        module: Any module whose layers with parameters of their own have `reset_parameters`.
        generator: Source of randomness; one integer is drawn from it.
        device: Where the parameters go; default: where the module's are.
        dtype: Their dtype; default: the module's.

    Returns:
        The parameters by name, as `torch.func.functional_call` takes them.

    Raises:
        ProblemError: A layer holds parameters and has no `reset_parameters`.
    """
    blank = {id(p): nn.Parameter(torch.empty_like(p, device="cpu")) for p in module.parameters()}
    template = copy.deepcopy(module, blank)
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        for name, layer in _children_first(template):
            reset = getattr(layer, "reset_parameters", getattr(layer, "_reset_parameters", None))
            if callable(reset):
                reset()
            elif any(True for _ in layer.parameters(recurse=False)):
                raise ProblemError(
                    f"layer {name or '(root)'!r} ({type(layer).__name__}) holds parameters but has "
                    "no reset_parameters(), so a fresh initialisation cannot be drawn for it"
                )
    places = {name: parameter.device for name, parameter in module.named_parameters()}
    return {
        name: parameter.detach().to(device=device or places[name], dtype=dtype)
        for name, parameter in template.named_parameters()
    }


def _children_first(module: nn.Module, name: str = "") -> Iterable[tuple[str, nn.Module]]:
    """A layer's own initialisation may overwrite that of its parts, so it comes after theirs."""
    for part, child in module.named_children():
        yield from _children_first(child, f"{name}.{part}" if name else part)
    yield name, module


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
