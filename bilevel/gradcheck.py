"""A check that users can run: is the hypergradient the derivative of what they wrote?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, final

import optree
import torch
from torch import Tensor

from bilevel.checks import check_integer
from bilevel.contract.derivatives import typical_size
from bilevel.contract.repeatable import is_same
from bilevel.double_precision import in_float64, to_float64
from bilevel.errors import BilevelError
from bilevel.estimators import Adjoint, Estimator
from bilevel.estimators.evolution_strategies import advance, draw_like
from bilevel.gradient_check import Comparison, GradientCheck
from bilevel.hypergradient import Hypergradient
from bilevel.random import Key
from bilevel.recording.inner import InnerLoop
from bilevel.recording.outer_gradient import outer_loss_value
from bilevel.recording.record import record
from bilevel.recording.trajectory import Trajectory, Window
from bilevel.result import HypergradientResult
from bilevel.tree import detach
from bilevel.variables import OuterVariables

#: Distances of the differences, in units of the size of the outer variables.
DISTANCES = {torch.float64: (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)}
COARSE = (1e-1, 3e-2, 1e-2, 3e-3)

#: By how much a derivative may differ from a difference, beside how much differences differ.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-2}
COARSE_TOLERANCE = 0.2


def gradcheck(
    hypergradient: Hypergradient,
    outer: Any,
    outer_batch: Any = None,
    *,
    directions: int = 3,
    generator: torch.Generator | None = None,
) -> GradientCheck:
    """Compare a hypergradient with central differences of the outer loss, as the user wrote both.

    Along random directions, and in every outer variable by itself, over the very same window from
    the same start iterate, with the same randomness. What no check of a graph can see is seen here:
    a value that was taken out of a tensor (`float`, `.item()`, NumPy), a `torch.no_grad`, a wrong
    backward. Every method is called twice, to see whether it gives the same.

    All of it is done in float64, if it can be: of the outer variables and the batch there are
    copies, and the tensors and modules that the problem holds hold copies meanwhile. Where a method
    insists on another dtype, the given ones are used, with a tolerance to match, and that is said.
    An estimator that leaves something out by design is set beside `Adjoint`, which is then what is
    compared. Neither the object that is checked nor its estimator or schedule is changed.

    It takes ten inner runs for every comparison: for a small instance of a problem.

    Args:
        hypergradient: What is checked.
        outer: φ, as for a call.
        outer_batch: As for a call.
        directions: How many random directions, at least 0.
        generator: Source of all randomness. Default: PyTorch's global generator.

    Returns:
        What was found; `print` shows it.

    Raises:
        ConfigurationError: `directions` is no integer of at least 0.

    Example:
        >>> class Towards(bilevel.Problem):
        ...     def init(self, outer, *, generator):
        ...         return torch.zeros(())
        ...
        ...     def inner_batch(self, outer, step, *, generator):
        ...         return outer * float(outer)  # a number: its derivative is lost
        ...
        ...     def inner_loss(self, params, batch):
        ...         return 0.5 * (params - batch) ** 2
        ...
        ...     def outer_loss(self, params, outer, batch):
        ...         return 0.5 * (params - batch) ** 2
        >>> hypergradient = bilevel.Hypergradient(Towards(), bilevel.optim.sgd(0.5), steps=3)
        >>> check = bilevel.gradcheck(hypergradient, torch.tensor(2.0), torch.tensor(1.0))
        >>> check.passed, check.verdict.split(":")[0]
        (False, "wrong in 'outer'")
    """
    directions = check_integer("directions", directions, minimum=0)
    key = Key.draw(generator)
    inner = hypergradient.inner
    try:
        with in_float64(inner.problem, inner.optimizer):
            check = _Check(hypergradient, to_float64(outer), to_float64(outer_batch), key)
            found = check.report(directions)
            why = f"init returns parameters in {check.dtype}"
            if check.dtype is torch.float64:
                return found
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    check = _Check(hypergradient, outer, outer_batch, key)
    check.remarks.append(
        f"not in float64 ({why}), so that errors below {check.tolerance:g} go unseen"
    )
    return check.report(directions)


@final
class _Check:
    """One check, of things as they are."""

    def __init__(self, original: Hypergradient, outer: Any, batch: Any, key: Key) -> None:
        self._original, self._outer, self._batch, self._key = original, outer, batch, key
        self._inner = InnerLoop(original.inner.problem, original.inner.optimizer)
        self._variables = OuterVariables(outer)
        self._refusal = ""
        self.remarks: list[str] = []
        estimator = original.estimator
        self._result = self._differentiate(copy.deepcopy(estimator))
        self._name = type(estimator).__name__
        exact = None
        if estimator.leaves_out and self._result is not None:
            exact = self._differentiate(Adjoint())
        if self._result is not None and exact is not None:
            self.remarks.append(
                f"{self._name} is {_distance(self._result, exact):.1e} of the norm away from "
                f"Adjoint, with which it is compared below: {estimator.leaves_out}"
            )
            self._result, self._name = exact, "Adjoint"
        self._trajectory, self._window = self._record()
        self.dtype = self._trajectory.first.params.dtype
        self.tolerance = TOLERANCES.get(self.dtype, COARSE_TOLERANCE)
        if estimator.leaves_out and exact is None:
            self.tolerance = COARSE_TOLERANCE
            self.remarks.append(f"compared to {self.tolerance:.0%}: {estimator.leaves_out}")

    def report(self, directions: int) -> GradientCheck:
        """What the comparisons and the methods come to."""
        methods = self._methods()
        comparisons = []
        try:
            comparisons = [self._compare(*each) for each in self._directions(directions)]
        except Exception as error:
            self._refusal = self._refusal or (
                f"the window cannot be run again ({type(error).__name__}: {error})"
            )
        return GradientCheck(
            comparisons=comparisons,
            methods=methods,
            refusal=self._refusal,
            remarks=self.remarks,
            estimator=self._name,
            window=self._window,
            dtype=self.dtype,
        )

    def _differentiate(self, estimator: Estimator) -> HypergradientResult | None:
        """The hypergradient by an estimator; None where it is refused."""
        original = self._original
        hypergradient = Hypergradient(
            original.inner.problem,
            original.inner.optimizer,
            original.steps,
            copy.deepcopy(original.truncation),
            estimator,
            keep_every=original.keep_every,
            keep_on=original.keep_on,
            graph_budget=original.graph_budget.bytes,
        )
        name = type(estimator).__name__
        try:
            result = hypergradient(self._outer, self._batch, self._generator())
        except BilevelError as error:
            self._refusal = f"{name} refuses: {error}"
            return None
        if result.stats.status != "ok":
            self.remarks.append(f"{name}: {result.stats.status}")
        return result

    def _generator(self) -> torch.Generator:
        return torch.Generator(self._key.device).manual_seed(self._key.seed)

    def _record(self) -> tuple[Trajectory, Window]:
        """The same run, and its window; without a hypergradient, all of it."""
        window = Window(0, self._original.steps) if self._result is None else self._result.window
        trajectory = record(
            self._inner,
            self._outer,
            Key.draw(self._generator()),
            steps=self._original.steps,
            horizon=window.stop,
            keep_from=window.start,
        )
        return trajectory.select(window), window

    def _directions(self, count: int) -> Iterator[tuple[str, list[Tensor]]]:
        """Random directions, of the size of the outer variables; then in each by itself."""
        leaves = detach(self._variables.leaves)
        draws = [draw_like(leaves, self._key.fold("direction", i)) for i in range(count + 1)]
        draws = [[d * typical_size(x) for d, x in zip(each, leaves, strict=True)] for each in draws]
        for index in range(count):
            yield f"random {index + 1}", draws[index]
        for index, name in enumerate(self._variables.names):
            yield name, [d if i == index else d * 0 for i, d in enumerate(draws[count])]

    def _compare(self, name: str, along: list[Tensor]) -> Comparison:
        quotients = [self._quotient(along, x) for x in DISTANCES.get(self.dtype, COARSE)]
        pairs = [(abs(b - a), b) for a, b in pairwise(quotients)]
        uncertainty, difference = min(pairs)
        if self._result is None:
            return Comparison(name, None, difference, uncertainty, None)
        grads = optree.tree_leaves(self._result.grads)
        derivative = float(sum((g * d).sum().double() for g, d in zip(grads, along, strict=True)))
        size = max(abs(derivative), abs(difference))
        rounding = torch.finfo(self.dtype).eps ** 0.5 * float(self._result.loss.abs())
        off = abs(derivative - difference)
        agrees: bool | None = off <= self.tolerance * size + 10 * uncertainty + rounding
        if uncertainty > max(0.02 * size, rounding):
            agrees = None
        return Comparison(name, derivative, difference, uncertainty, agrees)

    def _quotient(self, along: list[Tensor], distance: float) -> float:
        leaves = detach(self._variables.leaves)
        above, below = (
            self._value([x + sign * distance * d for x, d in zip(leaves, along, strict=True)])
            for sign in (1, -1)
        )
        return (above - below) / (2 * distance)

    @torch.no_grad()
    def _value(self, leaves: list[Tensor]) -> float:
        """The outer loss, and those along the window, from where the window starts."""
        start = self._window.start
        iterate = self._trajectory.iterate_at(start) if start else None
        outer = self._variables.like([leaf.detach() for leaf in leaves])
        segment = advance(self._trajectory, iterate, outer, self._window)
        end = outer_loss_value(self._inner, segment.iterate.params, outer, self._batch)[0]
        return float(segment.loss + end)

    @torch.no_grad()
    def _methods(self) -> dict[str, str]:
        """What every method gives when it is called twice with the same arguments."""
        inner, key = self._inner, self._trajectory.key
        outer, params = detach(self._variables.tree), self._trajectory.first.params.detach()
        hyperparameters = inner.hyperparameters(outer, 0)
        calls: dict[str, Callable[[], Any]] = {
            "init": lambda: inner.start(outer, key, hyperparameters).params,
            "inner_batch": lambda: inner.inputs(outer, 0, key).batch,
            "inner_loss": lambda: inner.gradient_without_graph(params, batch),
        }
        if hyperparameters:
            calls["hyperparameters"] = lambda: inner.hyperparameters(outer, 0)
        if inner.has_outer_loss:
            calls["outer_loss"] = lambda: outer_loss_value(inner, params, outer, self._batch)[0]
        if inner.has_step_loss:
            calls["step_loss"] = lambda: inner.step_loss(params, outer, 0, key)
        found = {}
        for name, call in calls.items():
            try:
                if name == "inner_loss":
                    batch = detach(inner.inputs(outer, 0, key).batch)
                same = is_same(detach(call()), detach(call()))
                found[name] = "the same" if same else "SOMETHING ELSE"
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
        return found


def _distance(one: HypergradientResult, other: HypergradientResult) -> float:
    """‖g − h‖ / ‖h‖ of two hypergradients."""
    pairs = zip(optree.tree_leaves(one.grads), optree.tree_leaves(other.grads), strict=True)
    squares = [((a - b).square().sum().double(), b.square().sum().double()) for a, b in pairs]
    off, size = (float(torch.stack(column).sum().sqrt()) for column in zip(*squares, strict=True))
    return off / max(size, 1e-300)
