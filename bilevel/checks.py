"""Arguments as a user gives them, checked where they enter, and what a problem's methods return.

Every check of an argument returns the value, or raises a `ConfigurationError` that names the
argument, the value and what is allowed. True and False are no numbers; NumPy's integers and floats
are.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from math import inf, isfinite
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import optree
import torch
from torch import Tensor

from bilevel.errors import ConfigurationError, ProblemError
from bilevel.tree import is_dense, is_variable, kind_of, named_leaves, needs_gradient

T = TypeVar("T")

#: No count of steps, images or networks is larger; what is was meant otherwise.
LARGEST_COUNT = 10**12


def check_integer(name: str, value: Any, minimum: int = 1, maximum: int | None = None) -> int:
    """`value` as an int: an integer of at least `minimum` and at most `maximum`.

    Without a `maximum` it is a count, which is at most `LARGEST_COUNT`.
    """
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or int(value) < minimum or (maximum is not None and int(value) > maximum):
        allowed = f"of at least {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
        raise ConfigurationError(f"{name}={value!r}: it must be an integer {allowed}")
    if maximum is None and int(value) > LARGEST_COUNT:
        raise ConfigurationError(
            f"{name}={value!r}: it must be an integer of at least {minimum}, and no count is "
            f"above {LARGEST_COUNT:.0e}"
        )
    return int(value)


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    minimum: float | None = None,
    below: float | None = None,
    maximum: float | None = None,
) -> float:
    """`value` as a float: a finite number, `above` < or `minimum` ≤ it, < `below` or ≤ `maximum`.

    Of `above` and `minimum`, and of `below` and `maximum`, at most one may be given.
    """
    number = _as_float(value)
    if (
        not isfinite(number)
        or (above is not None and not number > above)
        or (minimum is not None and not number >= minimum)
        or (below is not None and not number < below)
        or (maximum is not None and not number <= maximum)
    ):
        allowed = _interval(above, minimum, below, maximum)
        raise ConfigurationError(f"{name}={value!r}: it must be a finite number{allowed}")
    return number


def check_choice(name: str, value: Any, allowed: Sequence[T]) -> T:
    """The one of `allowed` that equals `value`."""
    for choice in allowed:
        same_kind = isinstance(value, bool) == isinstance(choice, bool)
        if same_kind and isinstance(value, Hashable) and value == choice:
            return choice
    names = ", ".join(map(repr, allowed))
    raise ConfigurationError(f"{name}={value!r}: it must be one of {names}")


def check_flag(name: str, value: Any) -> bool:
    """`value`, which must be True or False."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name}={value!r}: it must be True or False")
    return value


def check_instance(name: str, value: T, wanted: type, hint: str) -> T:
    """`value`, which must be an instance of `wanted`; `hint` shows a right one."""
    if not isinstance(value, wanted):
        found = f"the class {value.__name__}" if isinstance(value, type) else _article(type(value))
        raise ConfigurationError(
            f"{name} is {found}, not {_article(wanted)}: write for example {hint}"
        )
    return value


def check_device(name: str, value: Any) -> torch.device:
    """`value` as a device that holds numbers: one, or its name."""
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(
            f'{name}={value!r}: it must be a device, such as "cpu" or "cuda:0"'
        ) from error
    if device.type == "meta":
        raise ConfigurationError(f"{name}={value!r}: the meta device holds no numbers")
    return device


def check_path(name: str, value: Any) -> Path:
    """`value` as a path: one, or a string, that can be a file's; "~" is the user's home."""
    if not isinstance(value, (str, PathLike)) or not str(value) or "\0" in str(value):
        raise ConfigurationError(f"{name}={value!r}: it must be the path of a file or folder")
    return Path(value).expanduser()


def check_text(name: str, value: Any) -> str:
    """`value`, which must be a string that is not empty."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigurationError(f"{name}={value!r}: it must be a text that is not empty")
    return value


def check_callable(name: str, value: T, hint: str) -> T:
    """`value`, which must be callable; `hint` shows a right one."""
    if not callable(value):
        raise ConfigurationError(
            f"{name}={value!r}: it must be a function or class, for example {hint}"
        )
    return value


def _as_float(value: Any) -> float:
    """NaN for what is no number; infinity for an integer that is too large for a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return float("nan")
    try:
        return float(value)
    except OverflowError:
        return inf


def _interval(
    above: float | None, minimum: float | None, below: float | None, maximum: float | None
) -> str:
    """The words for these bounds, with a space before them; empty without bounds."""
    lower = above if minimum is None else minimum
    upper = below if maximum is None else maximum
    if lower is not None and upper is not None:
        left, right = "(" if minimum is None else "[", ")" if maximum is None else "]"
        return f" in {left}{lower}, {upper}{right}"
    if lower is not None:
        return f" above {lower}" if minimum is None else f" of at least {lower}"
    if upper is not None:
        return f" below {upper}" if maximum is None else f" of at most {upper}"
    return ""


def _article(kind: type) -> str:
    """The name of a class as one says it: a Problem, an Estimator."""
    return f"{'an' if kind.__name__[0] in 'AEIOUaeiou' else 'a'} {kind.__name__}"


def check_params(params: Any) -> None:
    """Raise `ProblemError` unless `params` are floating-point tensors, all of one dtype."""
    leaves = named_leaves(params)
    for name, leaf in leaves:
        if not is_variable(leaf):
            raise ProblemError(
                f"init returned {kind_of(leaf)} at {name!r}; parameters must be dense "
                "floating-point tensors of at least 16 bits"
            )
    dtypes = {leaf.dtype for _, leaf in leaves}
    if len(dtypes) != 1:
        raise ProblemError(
            f"init returned parameters of dtypes {sorted(map(str, dtypes))}; there must be "
            "at least one parameter, and all of one dtype"
        )


def check_batch(batch: Any) -> None:
    """Raise `ProblemError` for what can be read only once, or has no (dense) derivative by φ."""
    for name, leaf in named_leaves(batch):
        if isinstance(leaf, Iterator):
            raise ProblemError(
                f"inner_batch returned {kind_of(leaf)} at {name!r}, which can be read only once, "
                "and a step reads its batch more often: return a tuple or list of what it gives"
            )
        if isinstance(leaf, Tensor) and leaf.is_inference():
            raise ProblemError(
                f"inner_batch returned {kind_of(leaf)} at {name!r} that was made under "
                "torch.inference_mode, which no derivative may use: use torch.no_grad, or clone it"
            )
        if needs_gradient(leaf) and not is_dense(leaf):
            raise ProblemError(
                f"inner_batch returned {kind_of(leaf)} at {name!r} that depends on outer "
                "variables: return its values as a dense tensor, and put them where they belong "
                "in inner_loss"
            )


def check_metrics(value: tuple[Any, ...]) -> tuple[Any, dict[str, Tensor]]:
    """(the loss, its metrics) of a tuple, or `ProblemError` unless these are tensors or numbers."""
    if len(value) != 2 or not isinstance(value[1], Mapping):
        kinds = ", ".join(map(kind_of, value))
        raise ProblemError(
            f"outer_loss returned the tuple ({kinds}); it must be a scalar tensor, or a pair of "
            "one and a dict of metrics"
        )
    metrics = {}
    for name, metric in value[1].items():
        try:
            metrics[name] = torch.as_tensor(metric)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ProblemError(
                f"the metric {name!r} of outer_loss is {kind_of(metric)}; it must be a tensor or "
                "a number"
            ) from error
    return value[0], metrics


def check_scalar(value: Any, name: str) -> Tensor:
    """`value`, or `ProblemError` unless it is a dense floating-point scalar tensor."""
    if (
        not isinstance(value, Tensor)
        or value.dim()
        or not value.is_floating_point()
        or not is_dense(value)
    ):
        raise ProblemError(
            f"{name} returned {kind_of(value)}; it must be a floating-point scalar tensor"
        )
    return value


def check_hyperparameters(values: Any) -> dict[str, Any]:
    """`values` as a dict, or `ProblemError` unless each is a dense tensor or a pytree of them."""
    if not isinstance(values, Mapping):
        raise ProblemError(
            f"hyperparameters returned {kind_of(values)}; it must be a dict by name, as "
            '{"lr": ...}'
        )
    for name, value in values.items():
        leaves = [value] if isinstance(value, Tensor) else optree.tree_leaves(value)
        wrong = [
            leaf
            for leaf in leaves
            if not isinstance(leaf, Tensor) or not is_dense(leaf) or leaf.is_meta
        ]
        if wrong or not leaves:
            kind = kind_of(wrong[0]) if wrong else "nothing"
            raise ProblemError(
                f"hyperparameters()[{name!r}] holds {kind}; it must be a dense tensor, or a pytree "
                "of such like the parameters"
            )
    return dict(values)
