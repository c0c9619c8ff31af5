"""A network made for images, and tried on two of them before anything is spent on it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dd.runtime.error_text import summary


def network_for(make: Callable[..., nn.Module], image_format: Mapping[str, int]) -> nn.Module:
    """A network, which takes such images and gives as many logits as there are classes.

    Args:
        make: Makes it.
        image_format: `num_classes`, `channels` and `image_size`.

    Raises:
        ValueError: It cannot be made for these images, or does not take them.
        TypeError: It is given arguments that it does not have.
    """
    classes, channels, size = (
        image_format[name] for name in ("num_classes", "channels", "image_size")
    )
    name = getattr(make, "__name__", str(make))
    described = f"network: {name} for {classes} classes and images of {channels}×{size}×{size}"
    try:
        network = make(**image_format)
    except (ValueError, TypeError):
        raise  # it says what it does not take
    except Exception as error:
        raise ValueError(f"{described} cannot be made: {summary(error)}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{described} is a {type(network).__name__}, no torch.nn.Module")
    was_training = network.training
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            found: Any = network.eval()(torch.zeros(2, channels, size, size))
    except Exception as error:
        raise ValueError(f"{described} does not take them: {summary(error)}") from error
    finally:
        network.train(was_training)
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != (2, classes):
        raise ValueError(f"{described} gives {shape} of two images; it must be (2, {classes})")
    if not found.is_floating_point():
        raise ValueError(f"{described} gives {found.dtype}; logits are real numbers")
    if not found.requires_grad:
        raise ValueError(f"{described} gives what no parameter to be trained has a part in")
    return network
