"""Checks of what a user configured: each error names the parameter, the value, what is allowed."""

from collections.abc import Sequence
from typing import Any


def check_integer(name: str, value: Any, minimum: int) -> None:
    """Raise `ValueError` unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}={value!r}: it must be an integer of at least {minimum}")


def check_flag(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: it must be True or False")


def check_number(
    name: str, value: Any, *, above: float | None = None, minimum: float | None = None
) -> None:
    """Raise `ValueError` unless `value` is a number > `above` and ≥ `minimum`."""
    bound = f"above {above}" if above is not None else f"of at least {minimum}"
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or (above is not None and not value > above)
        or (minimum is not None and not value >= minimum)
    ):
        raise ValueError(f"{name}={value!r}: it must be a number {bound}")


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise `ValueError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: it must be one of {', '.join(map(repr, allowed))}")


def check_instance(name: str, value: Any, wanted: type, hint: str) -> None:
    """Raise `ValueError` unless `value` is an instance of `wanted`; `hint` shows a right one."""
    if not isinstance(value, wanted):
        kind = value.__name__ if isinstance(value, type) else f"a {type(value).__name__}"
        raise ValueError(f"{name} is {kind}, not a {wanted.__name__}: write for example {hint}")


def check_callable(name: str, value: Any, hint: str) -> None:
    """Raise `ValueError` unless `value` can be called; `hint` shows a right one."""
    if not callable(value):
        raise ValueError(f"{name}={value!r}: it must be a function or class, for example {hint}")
