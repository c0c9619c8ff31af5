"""What is asked of a transformation from elsewhere: that it is pure, and really differentiable."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import optree
import torch
import torchopt
from torch import Tensor
from torchopt.base import ChainedGradientTransformation, GradientTransformation

from bilevel.errors import ConfigurationError
from bilevel.optim.base import rule_of, transformation_of
from bilevel.optim.clipping import ClipByNorm
from bilevel.optim.composition import Chain, chain
from bilevel.optim.groups import Groups
from bilevel.tree import needs_gradient, partition

#: Sizes of the gradients that are tried, so that a bound is once far above and once far below.
SCALES = (1e-3, 1.0, 1e3, 1e6)

#: Points that are tried for each size.
POINTS = 2

#: Steps from each point, so that a state has its part.
STEPS = 3

#: By how much a derivative may differ from the difference quotient, as a part of the larger.
TOLERANCE = 1e-4


def settle(transformation: Any, device: torch.device, *, check: bool) -> None:
    """Make a TorchOpt transformation a pure function of its state.

    TorchOpt 0.7.3's momentum keeps a first-call flag outside its state, which would change what
    a step gives when it is run again or when the transformation is made anew for every step. One
    discarded update spends it. Without dampening a zero buffer then gives the same first step.

    Args:
        transformation: Any transformation; only TorchOpt's are touched, and those that one of ours
            is made of.
        device: Where its hyperparameters live.
        check: Also compare the first step with one that is run again.

    Raises:
        ConfigurationError: The flag changes the first step, as it does with dampening.
    """
    for part in parts_of(transformation):
        if getattr(part.update, "__module__", "").startswith("torchopt"):
            _spend_first_call(part, device, check=check)


def differentiable_form(transformation: Any) -> Any:
    """The same steps with a derivative, where one of TorchOpt's has lost it.

    `torchopt.clip.clip_grad_norm` takes its norm under `no_grad`; that of TorchOpt 0.7.3 becomes
    `clip_by_norm` with its 1e-6, by itself and in chains. Everything else stays as it is.
    """
    rule = rule_of(transformation)
    if isinstance(rule, Chain):
        return chain(*map(differentiable_form, rule.transformations))
    if isinstance(transformation, ChainedGradientTransformation):
        return torchopt.chain(*map(differentiable_form, transformation.transformations))
    update: Any = getattr(transformation, "update", None)
    if getattr(update, "__qualname__", "") == "clip_grad_norm.<locals>.update_fn":
        given = inspect.getclosurevars(update).nonlocals
        if (
            set(given) == {"max_norm", "norm_type", "error_if_nonfinite"}
            and given["norm_type"] == 2
        ):
            return transformation_of(ClipByNorm(given["max_norm"], eps=1e-6))
    return transformation


def check_differentiable(
    transformation: Any, like: Any, *, hyperparameters: Mapping[str, Any] | None = None
) -> None:
    """Raise unless autograd's derivative of a transformation is the derivative of what it does.

    A few steps are taken in float64 from random points. What autograd says of them, along one
    direction, is compared with a central difference along it. Where differences over several
    distances disagree, there is a kink or a jump between, and the point says nothing: a rule that
    clips at a bound or looks at signs is right as it is. What takes its norms under `no_grad`, or
    detaches them, is wrong wherever it is asked.

    Args:
        transformation: Any gradient transformation; with `hyperparameters`, the function that
            makes one from them.
        like: The parameters, a pytree of tensors, of which shapes and devices are used.
        hyperparameters: What it is made from. Those tensors among them that require a gradient are
            differentiated as well.

    Raises:
        ConfigurationError: It detaches something, writes to its arguments in place, gives another
            step when it is run again, or cannot be differentiated at all. The message names it.
    """
    learned, rebuild = partition(dict(hyperparameters or {}), needs_gradient)
    values = [leaf.detach().double() for leaf in learned]

    def make(leaves: list[Tensor]) -> Any:
        if hyperparameters is None:
            return transformation
        made = transformation(**rebuild(leaves))
        settle(made, optree.tree_leaves(like)[0].device, check=False)
        return made

    made = make(values)
    settle(made, optree.tree_leaves(like)[0].device, check=True)
    with _naming(made):
        _check_pure(made, like)
        wrong = _is_wrong(lambda _: made, like, [])
        wrong_by_hyperparameters = not wrong and bool(values) and _is_wrong(make, like, values)
    if wrong:
        raise ConfigurationError(
            f"the derivative of {_culprit(made, like)} is not that of what it computes: it takes "
            "something under torch.no_grad, detaches it (as a clip by a norm may), or has a wrong "
            "backward of its own, so every hypergradient would be wrong: use one of bilevel.optim, "
            "such as clip_by_norm, or compute it with a graph"
        )
    if wrong_by_hyperparameters:
        names = [name for name, each in (hyperparameters or {}).items() if _is_learned(each)]
        raise ConfigurationError(
            f"the derivative of {name_of(made)} by its hyperparameters {sorted(names)} is not that "
            "of what it computes: it detaches one, as float(…) and .item() do; use it as a tensor"
        )


def parts_of(transformation: Any) -> Iterator[Any]:
    """The transformations that one is made of, down to those that are not made of others."""
    parts = _direct_parts(transformation)
    if not parts:
        yield transformation
    for part in parts:
        yield from parts_of(part)


def name_of(transformation: Any) -> str:
    """What to call a transformation in a sentence, with what it is made of."""
    rule, update = rule_of(transformation), transformation.update
    inside = [name_of(part) for part in _direct_parts(transformation)]
    if rule is not None:
        name = f"bilevel.optim.{type(rule).__name__}"
    elif inside:
        name = type(transformation).__qualname__
    else:
        name = getattr(update, "__qualname__", type(update).__qualname__).split(".<locals>")[0]
        name = f"{getattr(update, '__module__', '')}.{name}"
        cells = [cell.cell_contents for cell in getattr(update, "__closure__", None) or ()]
        inside += [name_of(cell) for cell in cells if isinstance(cell, GradientTransformation)]
    return f"{name} of ({', '.join(inside)})" if inside else name


def _direct_parts(transformation: Any) -> tuple[Any, ...]:
    return getattr(rule_of(transformation) or transformation, "transformations", ())


def _spend_first_call(transformation: Any, device: torch.device, *, check: bool) -> None:
    probe = torch.ones(1, device=device)
    with torch.no_grad(), _naming(transformation):
        state = transformation.init(probe)
        first, *again = (
            transformation.update(probe.clone(), state, params=probe, inplace=False)[0]
            for _ in range(2 if check else 1)
        )
    if check and not torch.equal(first, again[0]):
        raise ConfigurationError(
            "this TorchOpt optimizer keeps a first-call flag outside its state that changes its "
            "first step (momentum with dampening does), so an inner run could not be repeated: "
            "use dampening=0"
        )


@contextmanager
def _naming(transformation: Any) -> Iterator[None]:
    """PyTorch's errors as ours, with the name of the transformation."""
    try:
        yield
    except ConfigurationError:
        raise
    except RuntimeError as error:
        raise ConfigurationError(
            f"{name_of(transformation)} cannot be run without a graph, or not be differentiated: "
            f"{error}"
        ) from error
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ConfigurationError(
            f"{name_of(transformation)} cannot be run on the pytree that init returned, as "
            f"update(updates, state, params=…, inplace=False): {type(error).__name__}: {error}"
        ) from error


@torch.no_grad()
def _check_pure(transformation: Any, like: Any) -> None:
    """Raise if a step writes to what it is given, or is another one when it is run again."""
    params, grads = (random_like(like, 1.0, seed) for seed in range(2))
    state = transformation.init(params)
    given = partition((params, grads, state), lambda leaf: isinstance(leaf, Tensor))[0]
    versions = [leaf._version for leaf in given]
    first, again = (
        transformation.update(grads, state, params=params, inplace=False)[0] for _ in range(2)
    )
    if versions != [leaf._version for leaf in given]:
        raise ConfigurationError(
            f"{name_of(transformation)} writes in place to its parameters, gradients or state, "
            "though it was told inplace=False: make new tensors instead"
        )
    if optree.tree_structure(first) != optree.tree_structure(params):
        raise ConfigurationError(
            f"{name_of(transformation)} returned updates of the structure "
            f"{optree.tree_structure(first)} for parameters of {optree.tree_structure(params)}"
        )
    shapes, wanted = (
        [tuple(getattr(leaf, "shape", "?")) for leaf in optree.tree_leaves(tree)]
        for tree in (first, params)
    )
    if shapes != wanted:
        raise ConfigurationError(
            f"{name_of(transformation)} returned updates of shapes {shapes}, parameters: {wanted}"
        )
    if not optree.tree_all(optree.tree_map(torch.equal, first, again)):
        raise ConfigurationError(
            f"{name_of(transformation)} gives another step when it is run again from the same "
            "state: it keeps something outside its state, or draws random numbers"
        )


def _culprit(transformation: Any, like: Any) -> str:
    """The name of the first part of a chain whose own derivative is wrong, else that of it all."""
    if not isinstance(rule_of(transformation), Groups):
        for part in _direct_parts(transformation):
            if _is_wrong(lambda _, part=part: part, like, []):  # type: ignore[misc]
                return _culprit(part, like)
    return name_of(transformation)


def _is_wrong(make: Callable[[list[Tensor]], Any], like: Any, values: list[Tensor]) -> bool:
    """Whether autograd's derivative is wrong at two points for gradients of one size.

    With `values` it is that by the hyperparameters, else that by the parameters and gradients.
    """
    return any(
        all(
            _is_wrong_at(make, like, values, scale, seed=100 * (len(SCALES) * point + index))
            for point in range(POINTS)
        )
        for index, scale in enumerate(SCALES)
    )


def _is_wrong_at(
    make: Callable[[list[Tensor]], Any], like: Any, values: list[Tensor], scale: float, seed: int
) -> bool:
    """Whether autograd's derivative is wrong at one point, along one direction."""
    sizes = [1.0] + [scale] * STEPS
    start = [random_like(like, size, seed + step) for step, size in enumerate(sizes)]
    noise = [random_like(like, size, seed + step) for step, size in enumerate(sizes, start=50)]

    def updates(distance: Tensor | float) -> list[Tensor]:
        if values:
            transformation = make([value * (1 + distance) for value in values])
            params, *grads = start
        else:
            # Along the gradients themselves, where a norm changes most, and at random.
            transformation = make([])
            params, *grads = (
                optree.tree_map(lambda x, e: x + distance * (x + e), point, along)
                for point, along in zip(start, noise, strict=True)
            )
        state, found = transformation.init(params), []
        for grad in grads:
            change, state = transformation.update(grad, state, params=params, inplace=False)
            params = optree.tree_map(torch.add, params, change)
            found += optree.tree_leaves(change)
        return found

    distance = torch.zeros((), dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        found = updates(distance)
        weights = [
            other + update.detach() / update.detach().square().mean().sqrt().clamp_min(1e-300)
            for update, other in zip(found, random_like(found, 1.0, seed + 99), strict=True)
        ]
        value = _weighed(weights, found)
        slope = 0.0
        if value.requires_grad:
            slope = float(torch.autograd.grad(value, distance)[0])

    @torch.no_grad()
    def quotient(step: float) -> float:
        above, below = (_weighed(weights, updates(sign * step)) for sign in (1, -1))
        return float(above - below) / (2 * step)

    allowed = 1e-6 * abs(float(value.detach()))
    near, *others = quotient(1e-5), quotient(5e-6), quotient(1e-8)
    if abs(slope - near) <= TOLERANCE * max(abs(near), abs(slope)) + allowed:
        return False
    return all(abs(near - other) <= TOLERANCE / 10 * abs(near) + allowed / 10 for other in others)


def _weighed(weights: list[Tensor], updates: list[Tensor]) -> Tensor:
    return torch.stack([(w * u).sum() for w, u in zip(weights, updates, strict=True)]).sum()


def random_like(like: Any, scale: float, seed: int) -> Any:
    """Normal float64 numbers of this size in the structure of some parameters."""
    draw = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, dtype=torch.float64, generator=draw)
    return optree.tree_map(lambda leaf: scale * normal(leaf.shape).to(leaf.device), like)


def _is_learned(tree: Any) -> bool:
    return any(needs_gradient(leaf) for leaf in optree.tree_leaves(tree))
