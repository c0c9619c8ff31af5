"""Methods that torch.compile, around a program that calls them, leaves as they are."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_REASON = "a hypergradient runs the functions of a problem, and differentiates them itself"


def untraced(method: Callable[P, R]) -> Callable[P, R]:
    """The method, run by Python also where torch.compile traces what is around it.

    `torch.compiler.disable` does that, but importing it takes seconds, which only those should
    wait for who compile something.
    """

    disabled: list[Callable[P, R]] = []

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return method(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(method, reason=_REASON))
        return disabled[0](*args, **kwargs)

    return call
