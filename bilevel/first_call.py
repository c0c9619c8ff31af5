"""What is checked of a problem at its first call, before it can mislead.

`docs/contract.md` says what is checked at every call, and what cannot be checked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

import optree
import torch
from torch import Tensor

from bilevel.checks import check_batch
from bilevel.contract.derivatives import wrong_second_derivative
from bilevel.contract.graph import functions_of, is_differentiable_once, leaves_of
from bilevel.contract.repeatable import (
    Kept,
    check_made_again,
    global_generators_left_alone,
    impure,
    is_same,
)
from bilevel.contract.second_derivatives import SecondDerivatives
from bilevel.contract.watch import Watch
from bilevel.errors import ProblemError
from bilevel.optim.side_by_side import check_side_by_side
from bilevel.random import Key
from bilevel.recording.inner import InnerLoop
from bilevel.recording.outer_gradient import outer_loss_value
from bilevel.recording.trajectory import Trajectory
from bilevel.replicas import Replicas
from bilevel.result import HypergradientResult
from bilevel.tree import detach, needs_gradient, partition
from bilevel.variables import Iterate, OuterVariables, StepInputs

if TYPE_CHECKING:
    from bilevel.estimators.base import Estimator

#: For so many of its steps the inner loss is evaluated again when the first run is over.
LOSSES_AGAIN = 16


@final
class FirstCall:
    """The checks of a first call: `begin`, `step` before some of them, `finish`, and `over`.

    Args:
        inner: The inner loop.
        estimator: What it needs decides what is checked.
        watch: Looks at where the results of methods come from.

    Attributes:
        remarks: Sentences for the status.
        at_first: (θ_0, b_0), after `step` 0.
    """

    def __init__(self, inner: InnerLoop, estimator: Estimator, watch: Watch) -> None:
        self.remarks = watch.remarks
        self._inner, self._estimator, self._watch = inner, estimator, watch
        self._kept: dict[int, Kept] = {}
        self._second: SecondDerivatives | None = None
        self.at_first: tuple[Tensor, Any]

    def begin(
        self, variables: OuterVariables, key: Key, first: Iterate, hyperparameters: dict[str, Any]
    ) -> None:
        """Take note of a run: φ, its randomness, (θ_0, s_0) and h_0, all on the graph of φ."""
        self._variables, self._key = variables, key
        self._first, self._hyperparameters = first, hyperparameters

    def drawn(self, inputs: StepInputs, step: int) -> None:
        """Take note of what a step takes of φ, as soon as it is made.

        Raises:
            ProblemError: The batch can be read only once, or is sparse and depends on φ.
        """
        check_batch(inputs.batch)
        self._kept[step] = Kept(self._variables, inputs)

    def step(self, iterate: Iterate, inputs: StepInputs, step: int, *, briefly: bool) -> None:
        """Look at one inner step, before it is made: is it the same when it is run again?

        Args:
            iterate: (θ_t, s_t), without a graph.
            inputs: What the step takes of φ, on its graph.
            step: t. What holds for all steps is looked at in the first.
            briefly: Look only at what the inner loss depends on.

        Raises:
            ProblemError: The inner loss does not depend on its parameters, writes to what it is
                given, draws from a global generator, differs when it is evaluated again, depends on
                other tensors than its arguments, or has an operation that can be differentiated
                only once; hyperparameters or a loss along the run differ when they are made again;
                or, where steps are run again for other φ, the initialisation or the batch does.
            ConfigurationError: The optimizer's derivative is not that of what it computes.
        """
        if briefly:
            with torch.enable_grad(), self._inner.watched(self._watch, "inner_loss"):
                self._inner.loss(iterate.params.detach().requires_grad_(), detach(inputs.batch))
            return
        self._check_inner_loss(iterate, inputs)
        self._check_others(iterate, inputs, step)
        if step == 0:
            self.at_first = iterate.params, detach(inputs.batch)
            self._check_optimizer(iterate, inputs)
            with self._inner.watched(None):
                self._estimator.check_step(self._inner, self._variables, self._key, iterate, inputs)

    @torch.no_grad()
    def finish(self, trajectory: Trajectory) -> None:
        """Look at what was recorded: is it still what it was?

        Raises:
            ProblemError: A batch, or what its derivative needs, was written over; or the inner
                loss differs when it is evaluated again at the end of the run.
        """
        for step, kept in self._kept.items():
            if trajectory.keeps_inputs(step) or trajectory.in_blocks:
                kept.check(step)
        if not trajectory.has_graph:
            return  # Going backward, every inner loss is evaluated again.
        window = trajectory.window
        steps = [t for t in sorted({*trajectory.kept} & {*trajectory.inputs}) if t >= window.start]
        losses = {}
        for step in steps[:: -(-len(steps) // LOSSES_AGAIN)]:
            params = trajectory.kept[step].params.to(trajectory.first.params.device)
            losses[step] = self._inner.loss(params, detach(trajectory.inputs[step].batch))
        trajectory.check_repeated(losses)

    def over(self, trajectory: Trajectory, outer_batch: Any) -> None:
        """Look once more when everything has been called as often as it will be.

        Raises:
            ProblemError: A second derivative of the inner loss is not what it was; or the outer
                loss, where it is evaluated more than once, differs when it is evaluated again.
        """
        if self._second is not None:
            self._second.check()
        inner, repeats = self._inner, self._estimator.repeats_outer_loss
        if not inner.has_outer_loss or not (repeats or inner.compiler is not None):
            return
        params = trajectory.iterate_at(trajectory.window.stop).params
        outer = detach(self._variables.tree)
        # Once in eager mode, where a graph does not show what is written to.
        one, other = (
            outer_loss_value(inner, params, outer, outer_batch)[0] if wanted else None
            for wanted in (True, repeats)
        )
        if one is not None and other is not None and not is_same(one, other):
            raise impure("outer_loss", float(one), float(other))

    def remarked(self, result: HypergradientResult) -> HypergradientResult:
        """The result with what was noticed in its status."""
        if not self.remarks:
            return result
        status = [] if result.stats.status == "ok" else [result.stats.status]
        stats = replace(result.stats, status="; ".join([*status, *self.remarks]))
        return replace(result, stats=stats)

    def _check_inner_loss(self, iterate: Iterate, inputs: StepInputs) -> None:
        inner = self._inner
        tensors, rebuild = partition(detach(inputs.batch), lambda leaf: isinstance(leaf, Tensor))
        copies = [leaf.clone() for leaf in tensors]
        here = iterate.params.detach().clone().requires_grad_()
        given = rebuild(copies)
        with torch.enable_grad(), global_generators_left_alone("inner_loss", here.device):
            try:
                with inner.watched(self._watch, "inner_loss"):
                    loss = inner.loss(here, rebuild(copies))
                again = inner.loss(here, given)
            except RuntimeError as error:
                if "inplace" in str(error).replace("-", ""):
                    raise ProblemError(
                        f"inner_loss writes to its params in place: {error}"
                    ) from error
                raise
        if optree.tree_structure(given) != optree.tree_structure(inputs.batch):
            raise ProblemError("inner_loss takes something out of its batch; work on a copy of it")
        if any(leaf._version for leaf in copies) or not is_same(copies, tensors):
            raise ProblemError("inner_loss writes to its batch in place; make a new tensor instead")
        if not is_same(here.detach(), iterate.params):
            raise ProblemError("inner_loss writes to its params; make a new tensor instead")
        if not any(leaf is here for leaf in leaves_of([loss])):
            raise ProblemError(
                "inner_loss does not depend on the params it is given; call the model through "
                "torch.func.functional_call(module, params, inputs), and not under torch.no_grad, "
                "torch.inference_mode or torch.utils.checkpoint(use_reentrant=True)"
            )
        functions = functions_of(loss)
        twice = self._estimator.uses_second_derivatives
        for function in functions if twice else ():
            if is_differentiable_once(function):
                raise ProblemError(
                    f"inner_loss uses {function.__name__}, whose backward is marked "
                    "@once_differentiable: its second derivative would be taken as zero; "
                    "bilevel.estimators.FiniteDifference needs none"
                )
        slope, other = (torch.autograd.grad(each, here)[0] for each in (loss, again))
        if not is_same(loss.detach(), again.detach()):
            raise impure("inner_loss", float(loss), float(again))
        if not is_same(slope, other):
            raise impure("inner_loss", "one gradient", "another")
        if twice:
            with inner.watched(None):
                second = SecondDerivatives(inner.loss, iterate.params, inputs.batch)
                second.check()
            self._second = self._second or second
        if functions and twice and self._is_wrong_twice(here, inputs.batch):
            names = ", ".join(function.__name__ for function in functions)
            self._remark(
                f"inner_loss uses a custom torch.autograd.Function ({names}), and autograd's "
                "second derivative of it is not the derivative of its first one: right for a "
                "straight-through estimator; else its backward must be made of operations on "
                "what forward was given, not of what forward computed"
            )

    def _remark(self, remark: str) -> None:
        if remark not in self.remarks:
            self.remarks.append(remark)

    def _is_wrong_twice(self, here: Tensor, batch: Any) -> bool:
        leaves, rebuild = partition(batch, needs_gradient)

        def gradient(params: Tensor, *leaves: Tensor) -> Tensor:
            with torch.enable_grad():
                return self._inner.gradient_with_graph(params, rebuild(leaves))[0]

        return wrong_second_derivative(gradient, [here, *leaves])

    def _check_others(self, iterate: Iterate, inputs: StepInputs, step: int) -> None:
        """Look at the other methods: do they give the same again?"""
        inner, outer = self._inner, detach(self._variables.tree)
        begun = self._hyperparameters if step == 0 else inner.hyperparameters(outer, step)
        one, other = detach((inputs.hyperparameters, begun))
        if sorted(one) != sorted(self._hyperparameters):
            raise ProblemError(
                f"hyperparameters returned {sorted(self._hyperparameters)} at step 0 and "
                f"{sorted(one)} at step {step}: they must have the same names at every step"
            )
        if not is_same(one, other):
            raise impure("hyperparameters", one, other)
        for name, value in one.items():
            if not all(bool(torch.isfinite(leaf).all()) for leaf in optree.tree_leaves(value)):
                raise ProblemError(
                    f"hyperparameters()[{name!r}] is not finite at step {step}: {value}"
                )
        if inner.has_step_loss:
            first, again = (
                inner.step_loss(iterate.params, outer, step, self._key).detach() for _ in range(2)
            )
            if not is_same(first, again):
                raise impure("step_loss", float(first), float(again))
        if self._estimator.runs_again and step == 0:
            hyperparameters = detach(inputs.hyperparameters)
            check_made_again(
                "init",
                self._first.params,
                lambda: inner.start(outer, self._key, hyperparameters).params,
            )
            check_made_again(
                "inner_batch", inputs.batch, lambda: inner.inputs(outer, 0, self._key).batch
            )

    def _check_optimizer(self, iterate: Iterate, inputs: StepInputs) -> None:
        """Look at the optimizer: does it treat replicas one by one and know only what it is given,
        and is it differentiable?"""
        inner = self._inner
        if isinstance(inner.problem, Replicas):
            made_of = detach(inputs.hyperparameters) or None
            check_side_by_side(inner.optimizer, inner.layout.example, hyperparameters=made_of)
        if not self._estimator.differentiates_optimizer:
            return
        inner.check_optimizer(inputs.hyperparameters)
        learned, rebuild = partition(inputs.hyperparameters, needs_gradient)

        def strangers() -> list[Tensor]:
            """What two steps depend on beside what they are given."""
            given = [leaf.detach().requires_grad_() for leaf in learned]
            first, second = (
                [iterate.params.detach().clone().requires_grad_() for _ in range(2)]
                for _ in range(2)
            )
            with torch.enable_grad():
                after = inner.update(
                    Iterate(first[0], detach(iterate.state)), first[1], rebuild(given)
                )
                again = inner.update(
                    Iterate(second[0], detach(after.state)), second[1], rebuild(given)
                )
            known = {id(leaf) for leaf in (*given, *first, *second)}
            found = [
                leaves_of(partition((x.params, x.state), needs_gradient)[0]) for x in (after, again)
            ]
            if any(leaf is own for leaf in found[1] for own in first):
                raise ProblemError(
                    "the optimizer's state holds tensors where they cannot be seen, so their "
                    "derivative would be lost: make it a dict, list, tuple or NamedTuple of "
                    f"tensors, which {type(after.state).__name__} may not be"
                )
            start = leaves_of(partition(self._first.state, needs_gradient)[0])
            known.update(id(leaf) for leaf in leaves_of([self._first.params]))
            known.update(map(id, self._variables.leaves))
            return [leaf for leaf in (*start, *found[0], *found[1]) if id(leaf) not in known]

        self._watch.judge("the optimizer", strangers(), strangers)
