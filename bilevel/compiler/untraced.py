"""Methods that torch.compile, around a program that calls them, leaves as they are."""

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def untraced(method: Callable[P, R]) -> Callable[P, R]:
    """The method, run by Python also where torch.compile traces what is around it.

    `torch.compiler.disable` does that, but importing it takes seconds, which only those should
    wait for who compile something.
    """

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" in sys.modules:
            found: R = _disabled(method)(*args, **kwargs)
            return found
        return method(*args, **kwargs)

    return call


@functools.cache
def _disabled(method: Callable[..., Any]) -> Callable[..., Any]:
    reason = "a hypergradient runs the user's functions and differentiates them itself"
    disabled: Callable[..., Any] = torch.compiler.disable(method, reason=reason)
    return disabled
