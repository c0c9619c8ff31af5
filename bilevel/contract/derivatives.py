"""Derivatives that an operation lacks, or has in one mode of autograd and not in another."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor

from bilevel.contract.second_derivatives import other_second_derivative
from bilevel.errors import BilevelError, ProblemError
from bilevel.tree import in_double

#: What PyTorch says of an operation that lacks the derivative that was asked for.
_MISSING = (
    r"derivative for '?(?:aten::)?(?P<name>\w+)",
    r"Trying to use forward AD with (?P<name>\S+) that does not support it",
    r"(?P<name>\w*(?:CuDNN|cudnn)\w*)[^.]*(?:double backward|second derivative)",
    r"[Dd]ouble backward[^.]* (?:not supported|not implemented)[^.]* for (?P<name>\w+)",
    r"Batching rule not implemented for (?:aten::)?(?P<name>\S+)",
    r"(?P<name>\w+) does not support (?:double )?backward",
)

#: What PyTorch says of other code that an estimator cannot differentiate, and what to say instead.
_UNFIT = (
    (
        "is being modified inplace",
        "a method writes in place to one of its arguments: make a new tensor instead",
    ),
    (
        "is being used in an in-place operation",
        "a method writes in place to one of its arguments: make a new tensor instead",
    ),
    (
        "Inference tensors cannot be saved for backward",
        "a method uses a tensor that was made under torch.inference_mode, which no derivative may "
        "use: make it under torch.no_grad, or clone it",
    ),
    (
        "allow_mutation_on_saved_tensors",
        "a method runs under torch.autograd.graph.allow_mutation_on_saved_tensors, which must "
        "then be around all that is differentiated: make new tensors in the method instead",
    ),
    (
        "modified by an inplace operation",
        "a tensor that the derivative of a step needs was written to in place after the step was "
        "made: a buffer, a counter, or a tensor of the problem",
    ),
    (
        "backward through the graph a second time",
        "something computed from the outer variables was kept from one step, or one method, to "
        "another, and is used in both: compute it anew in every method from the `outer` that it "
        "is given",
    ),
    (
        "autograd.Function with functorch transforms",
        "a custom torch.autograd.Function has no setup_context, which torch.func needs, through "
        "which {estimator} differentiates: give it one (and jvp for forward mode), or use "
        "Adjoint(), which does without",
    ),
    (
        "implement the jvp function",
        "a custom torch.autograd.Function has no jvp, the forward derivative that {estimator} "
        "needs: give it one, or use Adjoint(), which does without",
    ),
    (
        "support saved tensor hooks",
        "torch.utils.checkpoint, or another user of saved-tensor hooks, does not work in "
        "torch.func, through which {estimator} differentiates: use Adjoint(), which keeps the "
        "graph of one step in any case",
    ),
    (
        "Nested forward mode AD",
        "{estimator} takes forward derivatives, which PyTorch does not nest: call it outside "
        "torch.autograd.forward_ad.dual_level, or use Adjoint()",
    ),
    (
        "use_reentrant",
        "torch.utils.checkpoint(use_reentrant=True) cannot be differentiated twice: use "
        "use_reentrant=False",
    ),
    (
        "mutate a captured Tensor",
        "a method writes in place to a tensor that it was not given, which torch.func, through "
        "which {estimator} differentiates, cannot follow: make a new tensor instead",
    ),
    (
        "`.data` inside functorch",
        "a method writes through .data, as making or initialising a module does, which torch.func, "
        "through which {estimator} differentiates, cannot follow: do that before, or use Adjoint()",
    ),
    (
        "ATen/functorch/",
        "a method keeps a tensor that it has computed, in an attribute, a buffer or a list, and "
        "uses it in a later call, which torch.func, through which {estimator} may differentiate, "
        "cannot follow: compute it anew in every call",
    ),
    (
        "doesn't have storage",
        "a method gives a tensor to NumPy or writes to its memory, which torch.func, through which "
        "{estimator} differentiates, cannot follow: stay in PyTorch, or use Adjoint()",
    ),
    (
        "inside of a function being transformed by a functorch transform",
        "a method calls requires_grad_() or torch.autograd.functional, which do not work in "
        "torch.func, through which {estimator} differentiates: take derivatives inside a method "
        "by torch.func.grad, or use Adjoint()",
    ),
    (
        "One of the differentiated Tensors does not require grad",
        "a method differentiates by a tensor that it was given and that does not require a "
        "gradient, as batches and parameters need not: x = x if x.requires_grad else "
        "x.detach().requires_grad_()",
    ),
    (
        "element 0 of tensors does not require grad",
        "a method calls backward() for a tensor that does not require a gradient, as what is made "
        "of batches and parameters need not: take derivatives inside a method by torch.func.grad",
    ),
    (
        "backward() called inside a functorch transform",
        "a method calls backward(), which does not work in torch.func, through which {estimator} "
        "differentiates: take derivatives inside a method by torch.func.grad, or use Adjoint()",
    ),
    (
        "from user code:",
        "a function under torch.compile cannot be differentiated as {estimator} does: leave it as "
        "it is and use Hypergradient(compile=True)",
    ),
    (
        "does not currently support double backward",
        "a function under torch.compile cannot be differentiated twice: leave it as it is and use "
        "Hypergradient(compile=True)",
    ),
)


@contextmanager
def missing_derivatives_named(estimator: object) -> Iterator[None]:
    """Turn PyTorch's errors about an operation into a `ProblemError` that says a way out."""
    try:
        yield
    except Exception as error:
        if isinstance(error, BilevelError):
            raise
        text, name = str(error), type(estimator).__name__
        for pattern in _MISSING:
            found = re.search(pattern, text)
            if found:
                raise ProblemError(
                    f"the operation {found['name'].rstrip('.')} lacks a derivative that {name} "
                    f"needs ({_first_line(text)}). Write it in other operations, or choose an "
                    "estimator that needs less: Adjoint() and Reverse() need no forward "
                    "derivatives, FiniteDifference takes first derivatives of the inner loss only, "
                    "EvolutionStrategies none of the outer loss"
                ) from error
        for words, sentence in _UNFIT:
            if words in text:
                sentence = sentence.format(estimator=name)
                if sentence.startswith("a method "):
                    sentence = f"{_method_of(error)}{sentence.removeprefix('a method')}"
                raise ProblemError(f"{sentence} ({_first_line(text)})") from error
        raise


@final
class Direction:
    """A random direction, along which a function is differentiated by several ways.

    What is differentiated is ⟨w, f(x + εv)⟩ at ε = 0, with v of the size of x and w of size 1.

    Args:
        points: x, by tensor.

    Attributes:
        size: ‖f(x)‖, by which rounding is measured; known after `reverse`.
    """

    def __init__(self, points: Sequence[Tensor]) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._points = [point.detach() for point in points]
        self._along = [self._draw(point) * typical_size(point) for point in self._points]
        self._weights: list[Tensor] = []
        self.size = 0.0

    def reverse(self, function: Callable[..., Sequence[Tensor]]) -> float:
        """By `torch.autograd.grad`."""
        at = [point.clone().requires_grad_() for point in self._points]
        with torch.enable_grad():
            outputs = function(*at)
            self.size = (
                float(sum(in_double(x.detach()).abs().square().sum() for x in outputs)) ** 0.5
            )
            value = self._weighed(outputs)
            if not value.requires_grad:
                return 0.0
            found = torch.autograd.grad(value, at, materialize_grads=True)
        along = zip(found, self._along, strict=True)
        return float(sum((f * v).real.sum().double() for f, v in along))

    def forward(self, function: Callable[..., Sequence[Tensor]]) -> float:
        """By `torch.func.jvp`."""

        def weighed(*at: Tensor) -> Tensor:
            return self._weighed(function(*at))

        return float(torch.func.jvp(weighed, tuple(self._points), tuple(self._along))[1])

    def differences(self, function: Callable[..., Sequence[Tensor]], distance: float) -> float:
        """By central differences."""

        def value(step: float) -> float:
            at = [x.add(v, alpha=step) for x, v in zip(self._points, self._along, strict=True)]
            return float(self._weighed(function(*at)).detach())

        return (value(distance) - value(-distance)) / (2 * distance)

    def _weighed(self, outputs: Sequence[Tensor]) -> Tensor:
        outputs = [torch.view_as_real(x) if x.is_complex() else x for x in outputs]
        self._weights = self._weights or [self._draw(x) / max(1, x.numel()) ** 0.5 for x in outputs]
        return torch.stack(
            [(w * x).sum().double() for w, x in zip(self._weights, outputs, strict=True)]
        ).sum()

    def _draw(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._generator).to(like.device, like.dtype)


def wrong_second_derivative(gradient: Callable[..., Tensor], points: Sequence[Tensor]) -> bool:
    """Whether autograd's derivative of a gradient is not that of what the gradient computes.

    Where differences over two distances disagree, there is a kink between, and nothing is known.

    Args:
        gradient: (θ, *b) ↦ ∇_θ ℓ, on the graph of θ, which requires a gradient, and of b.
        points: θ and the leaves b of the batch.
    """
    direction = Direction(points)
    slope = direction.reverse(lambda *at: [gradient(*at)])

    def values(*at: Tensor) -> list[Tensor]:
        return [gradient(at[0].requires_grad_(), *at[1:]).detach()]

    rounding = _rounding(points)
    distance = rounding ** (1 / 3)
    near, far = (direction.differences(values, distance * part) for part in (0.25, 1.0))
    larger = max(abs(near), abs(slope), rounding ** (1 / 2) * direction.size)
    return abs(near - far) <= 0.01 * larger and abs(slope - near) > 0.05 * larger


def check_forward_mode(
    forward: Callable[..., Sequence[Tensor]],
    reverse: Callable[..., Sequence[Tensor]],
    points: Sequence[Tensor],
    estimator: object,
    *,
    beside: Sequence[Tensor] = (),
) -> None:
    """Raise `ProblemError` if forward mode sees another derivative of a step than reverse mode.

    Forward mode goes through `torch.no_grad`, reverse mode stops there.

    Args:
        forward: The step, as `torch.func.jvp` differentiates it.
        reverse: The same function, on the graph of its arguments.
        points: What they are given.
        estimator: The estimator that takes forward derivatives.
        beside: What else the step is made of, for its dtypes.
    """
    direction = Direction(points)
    try:
        one = direction.reverse(reverse)
    except RuntimeError:  # Reverse mode has no such derivative, and so no say.
        return
    other = direction.forward(forward)
    rounding = _rounding([*points, *beside])
    tolerance = 10 * rounding**0.5 * max(abs(one), abs(other)) + 1000 * rounding * direction.size
    if abs(one - other) > tolerance:
        if abs(one - direction.reverse(reverse)) > tolerance:
            raise other_second_derivative()
        name = type(estimator).__name__
        raise ProblemError(
            f"an inner step has another derivative in forward mode, which {name} uses, than in "
            "reverse mode: something in it is held back by torch.no_grad, which forward mode goes "
            "through. Use detach() instead, at which both stop, or Adjoint() or Reverse()"
        )


def typical_size(point: Tensor) -> float:
    """The size of an entry, 1 where all are zero."""
    size = float(in_double(point).abs().square().mean().sqrt()) if point.numel() else 0.0
    return size or 1.0


def _rounding(tensors: Sequence[Tensor]) -> float:
    """The rounding unit of the coarsest dtype among those of some tensors."""
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors)


def _method_of(error: Exception) -> str:
    """The method of the problem that raised an error; "a method" where it was raised later."""
    found, trace = "a method", error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_name == "_call" and "method" in frame.f_locals:
            found = str(frame.f_locals["name"])
        trace = trace.tb_next
    return found


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"
