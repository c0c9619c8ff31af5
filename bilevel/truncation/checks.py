"""Checks of a schedule's arguments: each error names the parameter, the value, what is allowed."""

from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import Any

from bilevel.errors import ConfigurationError


def check_integer(name: str, value: Any, minimum: int = 1) -> int:
    """An integer as given by a user, checked."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigurationError(f"{name}={value!r}: it must be an integer of at least {minimum}")
    return value


def check_number(name: str, value: Any, *, above: float) -> float:
    """A finite number as given by a user, checked."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < inf:
        raise ConfigurationError(f"{name}={value!r}: it must be a finite number above {above:g}")
    return float(value)


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """One of a few names as given by a user, checked."""
    if value not in allowed:
        names = ", ".join(map(repr, allowed))
        raise ConfigurationError(f"{name}={value!r}: it must be one of {names}")
    return str(value)


def read_metric(metrics: Mapping[str, float], name: str) -> float:
    """A metric that a schedule asks for, checked."""
    if name not in metrics:
        raise ConfigurationError(
            f"update was not given the metric {name!r}; it was given {sorted(metrics)}"
        )
    value = float(metrics[name])
    if not isfinite(value):
        raise ConfigurationError(f"the metric {name!r} is {value}; it must be finite")
    return value
