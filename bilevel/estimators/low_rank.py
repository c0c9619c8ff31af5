"""The backward recursion with one Hessian of low rank for the whole window."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from bilevel.basis import Anchor, Basis, Krylov, LowRankMatrix
from bilevel.checks import check_instance, check_integer, check_number
from bilevel.estimators.adjoint import Adjoint
from bilevel.estimators.base import Estimator
from bilevel.estimators.recursion import (
    BackwardRecursion,
    WindowEnd,
    gradient_response,
    pull_mixed,
)
from bilevel.linear import HessianOperator
from bilevel.recording.inner import InnerLoop
from bilevel.recording.trajectory import Trajectory
from bilevel.result import HypergradientResult, LowRankStats
from bilevel.tree import detach, needs_gradient, partition
from bilevel.window import Window


@final
class LowRank(Estimator):
    """`Adjoint` with the inner Hessian of the window's middle, of low rank, at every step.

    The recursion is that of `Adjoint`, the optimizer's VJP exact at every step, but

        λ ← λ' + H̃ ḡ_t,      φ̄ ← φ̄ + Σ_groups (∂b_c/∂φ)ᵀ ∂_b⟨∇_θ ℓ(θ_c, b_c), Σ_{t ∈ group} ḡ_t⟩

    with H̃ from `basis`, and with the mixed derivative of `group_size` steps taken once, at the
    step c in the middle of each group. With W the width of the window it takes about

        rank + W / group_size + 2

    passes backward through the graph of an inner gradient, where `Adjoint` takes W: one such pass
    gives the Hessian-vector product and the mixed product together, so a low-rank Hessian alone
    saves nothing. Only both together do, and only in a wide window.

    Exact for: a Hessian that is constant over the window, of rank ≤ that of the basis or seen
    through a Krylov space that holds the recursion, with `group_size` 1 (or a constant mixed
    derivative). Good for late windows of a run that fits its batch well. Not for: the first steps
    of a run, in particular of Adam, where curvature changes by its own size within a window, which
    more rank does not mend; inner batches that differ from step to step, of which one group sees
    one; windows of ten steps or fewer, where it is dearer than `Adjoint`.

    `guard` finds such windows: it compares H'u at both ends of the window with Hu at its middle,
    for the u that H is first applied to. Beyond it the exact recursion is used, and the status
    says so: the cost is three passes. The guard sees how stale H̃ is, not whether its rank is
    enough, nor what the groups cost.

    Args:
        basis: Where H̃ comes from. Default: `Krylov()`. `Eigenvectors` is the published form, dearer
            than `Adjoint` and less accurate.
        group_size: Steps that share one mixed product, at least 1.
        guard: The largest max ‖H'u − Hu‖ / ‖Hu‖ with which H̃ is used, above 0. None: always use it,
            and do not measure.

    Raises:
        ConfigurationError: An argument outside its range.
        NonFiniteError: (in a call) A Hessian-vector product is not finite.

    Source: the idea, AT-BPTT, arXiv 2510.04838, section on the low-rank Hessian approximation.
    """

    uses_inner_gradients = True
    leaves_out = "one Hessian of low rank stands for those of all steps"

    def __init__(
        self, basis: Basis | None = None, group_size: int = 8, guard: float | None = 0.6
    ) -> None:
        basis = Krylov() if basis is None else basis
        self.basis = check_instance("basis", basis, Basis, "bilevel.basis.Krylov()")
        self.group_size = check_integer("group_size", group_size)
        self.guard = None if guard is None else check_number("guard", guard, above=0)
        self.carries_over = self.basis.carries_over
        # One for all calls, since compiled graphs belong to the object whose method they are of.
        self._adjoint = Adjoint()

    def __call__(self, trajectory: Trajectory, outer_batch: Any) -> HypergradientResult:
        end = WindowEnd.of(trajectory, outer_batch)
        anchor = self._anchor(trajectory, end)
        staleness, reason = None, ""
        if not bool(torch.isfinite(anchor.gradient.norm() + end.cotangent.norm())):
            reason = "the inner gradient or ∂F/∂θ is not finite"
        elif self.guard is not None:
            staleness = _staleness(trajectory, anchor)
            if not staleness <= self.guard:
                reason = (
                    f"the Hessian changes by {staleness:.2g} of itself within the window, more "
                    f"than guard={self.guard:g}"
                )
        hessian = None if reason else self.basis.approximate(anchor)
        products = anchor.hessian.products + (0 if staleness is None else 2)
        del anchor  # and the graph that it holds
        if hessian is None:
            return self._adjoint.through_window(
                trajectory,
                end,
                products_before=products,
                remarks=[f"exact recursion: {reason}"],
                low_rank=LowRankStats(
                    spectrum=end.cotangent[:0],
                    evaluations=products + trajectory.window.width,
                    staleness=staleness,
                    exact=True,
                ),
            )
        return self._through_window(trajectory, end, hessian, products, staleness)

    def _through_window(
        self,
        trajectory: Trajectory,
        end: WindowEnd,
        hessian: LowRankMatrix,
        products: int,
        staleness: float | None,
    ) -> HypergradientResult:
        inner, recursion = trajectory.inner, BackwardRecursion(trajectory, end)
        groups = _groups(trajectory.window, self.group_size)
        group, total, mixed_products = groups.pop(), torch.zeros_like(end.cotangent), 0
        for step, iterate, inputs in recursion.steps():
            cotangent, state_cotangents, gradient_cotangent, hyper_cotangents = (
                recursion.pull_update(iterate, inputs)
            )
            end.gradient.pull(
                partition(inputs.hyperparameters, needs_gradient)[0], hyper_cotangents
            )
            recursion.step_back(step, cotangent + hessian(gradient_cotangent), state_cotangents)
            total = total + gradient_cotangent
            if step == group[len(group) // 2]:
                params, batch = iterate.params, inputs.batch
            if step == group[0]:
                leaves = partition(batch, needs_gradient)[0]
                if leaves:
                    cotangents = inner.run(pull_mixed, inner, params, batch, total)
                    end.gradient.pull(leaves, cotangents)
                    mixed_products += 1
                group, total = groups.pop() if groups else [], torch.zeros_like(total)
        return recursion.result(
            hessian_vector_products=products,
            low_rank=LowRankStats(
                spectrum=hessian.values,
                evaluations=products + mixed_products,
                staleness=staleness,
                exact=False,
            ),
        )

    def _anchor(self, trajectory: Trajectory, end: WindowEnd) -> Anchor:
        window, inner = trajectory.window, trajectory.inner
        step = window.start + window.width // 2
        iterate, inputs = trajectory.iterate_at(step), trajectory.inputs_at(step)
        hessian, loss = _hessian(inner, iterate.params, inputs.batch)
        trajectory.check_repeated({step: loss})
        return Anchor(
            hessian=hessian,
            gradient=hessian.gradient,
            cotangent=end.cotangent,
            response=gradient_response(
                inner, iterate, hessian.gradient, inputs.hyperparameters, steps=window.width
            ),
            steps=window.width,
            generator=trajectory.key.generator("basis", device=end.cotangent.device),
        )

    def state_dict(self) -> dict[str, Any]:
        """That of the basis."""
        return self.basis.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.basis.load_state_dict(state)


def _hessian(inner: InnerLoop, params: Tensor, batch: Any) -> tuple[HessianOperator, Tensor]:
    """∇²_θ ℓ(θ, b) for many products, and ℓ(θ, b)."""
    losses = []

    def gradient(params: Tensor) -> Tensor:
        gradient, loss = inner.gradient_with_graph(params, detach(batch))
        losses.append(loss.detach())
        return gradient

    return HessianOperator(gradient, params), losses[0]


def _staleness(trajectory: Trajectory, anchor: Anchor) -> float:
    """max ‖H'u − Hu‖ / ‖Hu‖ over the Hessians H' at the first and the last step of the window."""
    window = trajectory.window
    changes = []
    for step in (window.start, window.stop - 1):
        params = trajectory.iterate_at(step).params
        hessian, _ = _hessian(trajectory.inner, params, trajectory.inputs_at(step).batch)
        changes.append(torch.linalg.vector_norm(hessian(anchor.direction) - anchor.image))
    # A Hessian that is zero throughout has not changed.
    size = torch.linalg.vector_norm(anchor.image).clamp_min(torch.finfo(params.dtype).tiny)
    return float(torch.stack(changes).max() / size)


def _groups(window: Window, size: int) -> list[list[int]]:
    """The steps of the window in runs of nearly equal length, at most `size`."""
    steps = torch.arange(window.start, window.stop)
    return [part.tolist() for part in steps.tensor_split(-(-window.width // size))]
