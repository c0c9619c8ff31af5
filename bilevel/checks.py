"""Arguments as a user gives them, checked where they enter."""

from collections.abc import Sequence
from typing import Any

from bilevel.errors import ConfigurationError


def check_integer(name: str, value: int, minimum: int = 1) -> int:
    """`value`, or `ConfigurationError` unless it is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigurationError(f"{name}={value!r}: it must be an integer of at least {minimum}")
    return value


def check_positive(name: str, value: float, *, or_zero: bool = False) -> float:
    """`value` as a float, or `ConfigurationError` unless it is a finite number above 0."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (0 < value < float("inf") or (or_zero and value == 0))
    ):
        allowed = "of at least 0" if or_zero else "above 0"
        raise ConfigurationError(f"{name}={value!r}: it must be a finite number {allowed}")
    return float(value)


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """One of a few names as given by a user, checked."""
    if value not in allowed:
        names = ", ".join(map(repr, allowed))
        raise ConfigurationError(f"{name}={value!r}: it must be one of {names}")
    return str(value)
