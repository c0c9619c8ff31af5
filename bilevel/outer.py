"""The outer variables during one call: private leaves on which gradients accumulate."""

from collections.abc import Sequence
from typing import Any, final

import optree
import torch
from torch import Tensor

from bilevel.errors import ProblemError, UnusedOuterVariableError
from bilevel.inner import InnerLoop
from bilevel.micro_batches import MicroBatches
from bilevel.trajectory import Trajectory
from bilevel.tree import detach, is_differentiable, named_leaves, partition


@final
class OuterVariables:
    """Detached copies of the outer variables, made leaves of a private graph.

    Args:
        outer: A pytree of floating-point tensors.

    Raises:
        ProblemError: `outer` is empty or holds something else.
    """

    def __init__(self, outer: Any) -> None:
        self.names = []
        self.leaves: list[Tensor] = []
        for name, leaf in named_leaves(outer):
            if not is_differentiable(leaf):
                kind = f"{leaf.dtype} tensor" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise ProblemError(
                    f"outer variable {name!r} is a {kind}; outer variables must be floating-point "
                    "tensors, constants belong in the problem"
                )
            self.names.append(name)
            self.leaves.append(leaf.detach().clone().requires_grad_())
        if not self.leaves:
            raise ProblemError("there are no outer variables to differentiate")
        self._used_by_outer_loss: set[int] = set()
        self._spec = optree.tree_structure(outer)
        self.tree = self.like(self.leaves)

    def like(self, leaves: Sequence[Tensor]) -> Any:
        """`leaves` arranged as the outer variables are."""
        return optree.tree_unflatten(self._spec, list(leaves))

    def accumulate(self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> None:
        """φ̄ += VJP of `outputs` (which depend on the leaves) applied to `cotangents`."""
        pairs = [
            (output, cotangent)
            for output, cotangent in zip(outputs, cotangents, strict=True)
            if output.requires_grad
        ]
        if pairs:
            outputs, cotangents = zip(*pairs, strict=True)
            torch.autograd.backward(outputs, cotangents, inputs=self.leaves)

    def outer_loss_at(
        self, inner: InnerLoop, params: Tensor, outer_batch: Any
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """(F, its metrics, ∂F/∂θ) at θ = `params`; ∂F/∂φ is accumulated.

        Of `MicroBatches`, one is in memory at a time.

        Raises:
            ProblemError: F does not depend on θ.
        """
        if not isinstance(outer_batch, MicroBatches):
            outer_batch = MicroBatches([outer_batch])
        total = torch.zeros(())
        totals: dict[str, Tensor] = {}
        cotangent: Tensor | None = None
        for batch, weight in outer_batch:
            loss, metrics, (params_grad, *grads) = inner.run(
                _outer_gradients, inner, params.detach(), self.tree, batch
            )
            total = total.to(loss) + loss * weight
            totals = {
                name: totals[name] + value * weight if totals else value * weight
                for name, value in metrics.items()
            }
            if params_grad is None:
                raise ProblemError("outer_loss does not depend on the params it is given")
            params_grad = params_grad * weight
            cotangent = params_grad if cotangent is None else cotangent.add_(params_grad)
            for index, (leaf, grad) in enumerate(zip(self.leaves, grads, strict=True)):
                if grad is not None:
                    self._used_by_outer_loss.add(index)
                    grad = grad * weight
                    leaf.grad = grad if leaf.grad is None else leaf.grad.add_(grad)
        assert cotangent is not None, "MicroBatches holds at least one"
        return total, totals, cotangent

    def gradients(self, inner: InnerLoop, trajectory: Trajectory) -> tuple[list[Tensor], str]:
        """The accumulated gradients, and a status.

        A variable whose gradient is exactly zero is an error, unless something in the whole run
        depends on it: then the status says that it is zero through this window.

        Raises:
            UnusedOuterVariableError: Nothing depends on some outer variable.
        """
        suspects = [
            index
            for index, leaf in enumerate(self.leaves)
            if leaf.grad is None or not leaf.grad.any()
        ]
        status = "ok"
        if suspects:
            used = self._used_anywhere(inner, trajectory)
            unused = [self.names[index] for index in suspects if index not in used]
            if unused:
                raise UnusedOuterVariableError(
                    f"nothing depends on outer variables {unused}: not the gradient of the inner "
                    "loss through its batch, the initialisation, the hyperparameters or the outer "
                    "loss"
                )
            window = trajectory.window
            status = (
                f"the gradient of outer variables {[self.names[index] for index in suspects]} is "
                f"exactly zero through the window [{window.start}, {window.stop})"
            )
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves]
        return [grad.detach() for grad in grads], status

    def _used_anywhere(self, inner: InnerLoop, trajectory: Trajectory) -> set[int]:
        """Indices of the leaves that anything in the whole run depends on, window or not."""
        used = set(self._used_by_outer_loss)

        def look(tree: Any) -> None:
            outputs = [leaf.sum() for leaf in partition(tree)[0] if leaf.requires_grad]
            if outputs:
                total = torch.stack([output.double() for output in outputs]).sum()
                grads = torch.autograd.grad(total, self.leaves, allow_unused=True)
                used.update(index for index, grad in enumerate(grads) if grad is not None)

        with torch.enable_grad():
            hyperparameters = inner.hyperparameters(self.tree)
            start = inner.start(self.tree, trajectory.key, hyperparameters)
            look([hyperparameters, start.params, start.state])
            params = start.params.detach().requires_grad_()
            for step in range(trajectory.steps):
                if len(used) == len(self.leaves):
                    break
                loss = inner.loss(params, inner.batch(self.tree, step, trajectory.key))
                if not loss.requires_grad:
                    continue
                look(
                    torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)[0]
                )
        return used


def _outer_gradients(
    inner: InnerLoop, params: Tensor, outer: Any, batch: Any
) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor | None, ...]]:
    """(F, its metrics, (∂F/∂θ, ∂F/∂φ leaf by leaf)); None where F does not depend on it."""
    params = params.detach().requires_grad_()
    leaves = partition(outer)[0]
    with torch.enable_grad():
        loss, metrics = inner.outer_loss(params, outer, batch)
    grads: tuple[Tensor | None, ...] = (None,) * (1 + len(leaves))
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, [params, *leaves], allow_unused=True)
    return loss.detach(), detach(metrics), grads


def leaves_with_grad(outer: Any) -> list[Tensor]:
    """The outer tensors as the user holds them, each fit to have its `.grad` filled.

    Raises:
        ProblemError: One is not a leaf that requires gradients.
    """
    leaves = named_leaves(outer)
    for name, leaf in leaves:
        if not (isinstance(leaf, Tensor) and leaf.is_leaf and leaf.requires_grad):
            raise ProblemError(
                f"outer variable {name!r} is not a leaf tensor with requires_grad=True, so "
                "its .grad cannot be filled"
            )
    return [leaf for _, leaf in leaves]


@torch.no_grad()
def add_to_grad(leaves: Sequence[Tensor], grads: Any) -> None:
    """Add the pytree `grads` to the `.grad` of `leaves`, as autograd would."""
    for leaf, grad in zip(leaves, optree.tree_leaves(grads), strict=True):
        if leaf.grad is None:
            leaf.grad = grad.clone()
        else:
            leaf.grad.add_(grad)


@torch.no_grad()
def outer_loss_value(
    inner: InnerLoop, params: Tensor, outer: Any, outer_batch: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """(F, its metrics) at θ = `params`, without a derivative."""
    if not isinstance(outer_batch, MicroBatches):
        outer_batch = MicroBatches([outer_batch])
    losses, metrics = [], []
    for batch, weight in outer_batch:
        loss, reported = inner.outer_loss(params, outer, batch)
        losses.append(loss * weight)
        metrics.append({name: value * weight for name, value in reported.items()})
    return torch.stack(losses).sum(), _added(metrics)


def _added(metrics: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in metrics]).sum(0) for name in metrics[0]}
