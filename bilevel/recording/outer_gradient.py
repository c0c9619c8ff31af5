"""dF/dφ as it gathers during one estimate, and outer batches in pieces."""

from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from bilevel.checks import check_number
from bilevel.errors import ConfigurationError, ProblemError, UnusedOuterVariableError
from bilevel.random import Key
from bilevel.recording.inner import InnerLoop
from bilevel.recording.trajectory import Trajectory
from bilevel.tree import detach, needs_gradient, partition


@final
class MicroBatches:
    """Several outer batches that stand for one: F(θ, φ) = Σᵢ wᵢ F(θ, φ; batchᵢ).

    Given to `Hypergradient` as `outer_batch`. Gradients and metrics accumulate with the same
    weights, so an outer loss that is a mean over examples gives the same hypergradient as the
    whole batch, with the graph of one piece in memory.

    Args:
        batches: What `Problem.outer_loss` takes, at least one.
        weights: One weight for each, such as its share of the examples; default: all equal,
            adding up to 1.

    Raises:
        ConfigurationError: There is no batch, or not one finite weight for each.
    """

    def __init__(self, batches: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        if not batches:
            raise ConfigurationError("batches is empty: there must be at least one")
        if weights is not None and len(weights) != len(batches):
            raise ConfigurationError(f"{len(weights)} weights for {len(batches)} batches")
        if weights is None:
            weights = [1 / len(batches)] * len(batches)
        self.batches = list(batches)
        self.weights = [
            check_number(f"weights[{index}]", weight) for index, weight in enumerate(weights)
        ]

    def __iter__(self) -> Iterator[tuple[Any, float]]:
        return iter(zip(self.batches, self.weights, strict=True))


#: What is wrong where no gradient reaches θ.
OUTER_LOSS_APART = (
    "outer_loss does not depend on the params it is given; call the model through "
    "torch.func.functional_call(module, params, inputs), and not under torch.no_grad or "
    "torch.inference_mode"
)

#: Cotangents of so many bytes, or of so many steps, are pulled back to φ at once.
BLOCK_BYTES = 4 * 2**20
BLOCK_STEPS = 32


@final
class OuterGradient:
    """dF/dφ as it gathers during one estimate.

    Args:
        trajectory: The recorded run; its outer variables are those that are differentiated.
        twice: Whether the inner loss can be differentiated twice.
        certain: Whether a derivative that exists is always seen. Else a gradient of zero is no
            ground for an error.
    """

    def __init__(self, trajectory: Trajectory, *, twice: bool = True, certain: bool = True) -> None:
        self._trajectory, self._twice, self._certain = trajectory, twice, certain
        self._inner = trajectory.inner
        self.variables = trajectory.variables
        self._sums: list[Tensor | None] = [None] * len(self.variables.leaves)
        self._used_by_losses: set[int] = set()
        self._outputs: list[Tensor] = []
        self._cotangents: list[Tensor] = []
        self._waiting = 0

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add to the gradient, leaf by leaf; None is zero."""
        for index, grad in enumerate(grads):
            if grad is not None:
                before = self._sums[index]
                self._sums[index] = grad if before is None else before + grad

    def add_of_loss(self, grads: Sequence[Tensor | None]) -> None:
        """Add to the gradient what a loss gives directly, which uses what it does not ignore."""
        self._used_by_losses.update(i for i, grad in enumerate(grads) if grad is not None)
        self.add(grads)

    def pull(self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> None:
        """φ̄ += VJP of `outputs`, which depend on φ, applied to `cotangents`, step after step.

        Where the recording kept their graphs, those of several steps are pulled back together,
        which saves time; else every graph is let go at once.
        """
        for output, cotangent in zip(outputs, cotangents, strict=True):
            if output.requires_grad:
                self._outputs.append(output)
                self._cotangents.append(cotangent)
        self._waiting += 1
        size = sum(cotangent.nbytes for cotangent in self._cotangents)
        run = self._trajectory
        kept = run.inputs or any(block.on_graph for block in run.blocks)
        block = BLOCK_STEPS if kept else 1
        if size > BLOCK_BYTES or self._waiting >= block:
            self._pull_now()

    def outer_loss_at(
        self, params: Tensor, outer_batch: Any
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """(F, its metrics, ∂F/∂θ) at θ = `params`; ∂F/∂φ is added.

        Of `MicroBatches`, one is in memory at a time.

        Raises:
            ProblemError: F does not depend on θ, and there are no losses along the run.
        """
        total, cotangent = params.new_zeros(()), torch.zeros_like(params)
        totals: dict[str, Tensor] = {}
        for batch, weight in _pieces(outer_batch):
            loss, metrics, (params_grad, *grads) = self._inner.run(
                _outer_gradients, self._inner, params.detach(), self.variables.own_tree, batch
            )
            if params_grad is None and not self._inner.has_step_loss:
                raise ProblemError(OUTER_LOSS_APART)
            if loss is not None:
                total = total.to(loss) + loss * weight
            for name, value in metrics.items():
                totals[name] = totals[name] + value * weight if name in totals else value * weight
            if params_grad is not None:
                cotangent = cotangent + params_grad * weight
            self.add_of_loss([None if grad is None else grad * weight for grad in grads])
        return total, totals, cotangent

    def step_loss_at(self, params: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(f_t, ∂f_t/∂θ) at θ = θ_{t+1}, t = `step`; ∂f_t/∂φ is added."""
        loss, (params_grad, *grads) = self._inner.run(
            _step_gradients,
            self._inner,
            params.detach(),
            self.variables.own_tree,
            step,
            self._trajectory.key,
        )
        self.add_of_loss(grads)
        return loss, torch.zeros_like(params) if params_grad is None else params_grad

    def total(self) -> tuple[list[Tensor], str]:
        """The gradient by leaf, and a status.

        A variable whose gradient is exactly zero is an error, unless something in the whole run
        depends on it: then the status says that it is zero through this window.

        Raises:
            UnusedOuterVariableError: Nothing depends on some outer variable.
        """
        self._pull_now()
        suspects = [
            index for index, grad in enumerate(self._sums) if grad is None or not grad.any()
        ]
        status = "ok"
        if suspects:
            names = [self.variables.names[index] for index in suspects]
            used = self._used_anywhere() if self._certain else set(suspects)
            unused = [self.variables.names[index] for index in suspects if index not in used]
            if unused:
                raise UnusedOuterVariableError(
                    f"nothing depends on outer variables {unused}: not the gradient of the inner "
                    "loss through its batch, the initialisation, the hyperparameters or the outer "
                    "loss"
                )
            window = self._trajectory.window
            status = (
                f"the gradient of outer variables {names} is exactly zero through the window "
                f"[{window.start}, {window.stop})"
                + ("" if self._knows_zero(suspects) else ", as far as this estimator can see")
            )
        grads = [
            torch.zeros_like(leaf) if grad is None else grad.to(leaf)
            for leaf, grad in zip(self.variables.leaves, self._sums, strict=True)
        ]
        return [grad.detach() for grad in grads], status

    def _knows_zero(self, indices: Sequence[int]) -> bool:
        """Whether these gradients are zero and not only too small for differences to see."""
        no_path = all(self._sums[index] is None for index in indices)
        return self._certain and (self._twice or no_path)

    def _pull_now(self) -> None:
        if self._outputs:
            self.add(
                torch.autograd.grad(
                    self._outputs, self.variables.leaves, self._cotangents, allow_unused=True
                )
            )
        self._outputs, self._cotangents, self._waiting = [], [], 0

    def _used_anywhere(self) -> set[int]:
        """Indices of the leaves that anything in the whole run depends on, window or not.

        Where the inner loss can be differentiated only once, an inner loss that depends on a
        variable counts as one whose gradient does.
        """
        used, inner, run = set(self._used_by_losses), self._inner, self._trajectory
        leaves, tree = self.variables.leaves, self.variables.tree

        def add_used(outputs: Any) -> None:
            found = [leaf.sum().abs().double() for leaf in partition(outputs, needs_gradient)[0]]
            if found:
                grads = torch.autograd.grad(torch.stack(found).sum(), leaves, allow_unused=True)
                used.update(index for index, grad in enumerate(grads) if grad is not None)

        with torch.enable_grad():
            inputs = run.made_again(tree, 0)
            start = inner.start(tree, run.key, inputs.hyperparameters)
            add_used([inputs.hyperparameters, start.params, start.state])
            params = start.params.detach().requires_grad_()
            for step in range(run.steps):
                if len(used) == len(leaves):
                    break
                inputs = run.made_again(tree, step) if step else inputs
                if self._twice:
                    add_used([inner.gradient_with_graph(params, inputs.batch)[0]])
                else:
                    add_used([inner.loss(params.detach(), inputs.batch)])
                if step:
                    add_used([inputs.hyperparameters])
        return used


def _pieces(outer_batch: Any) -> MicroBatches:
    return outer_batch if isinstance(outer_batch, MicroBatches) else MicroBatches([outer_batch])


def _outer_gradients(
    inner: InnerLoop, params: Tensor, outer: Any, batch: Any
) -> tuple[Tensor | None, dict[str, Tensor], tuple[Tensor | None, ...]]:
    """(F, its metrics, (∂F/∂θ, ∂F/∂φ leaf by leaf)); None where F does not depend on it."""
    params = params.detach().requires_grad_()
    with torch.enable_grad():
        loss, metrics = inner.outer_loss(params, outer, batch)
    return detach(loss), detach(metrics), _gradients(loss, [params, *partition(outer)[0]])


def _step_gradients(
    inner: InnerLoop, params: Tensor, outer: Any, step: int, key: Key
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """(f_t, (∂f_t/∂θ, ∂f_t/∂φ leaf by leaf)); None where f_t does not depend on it."""
    params = params.detach().requires_grad_()
    with torch.enable_grad():
        loss = inner.step_loss(params, outer, step, key)
    return loss.detach(), _gradients(loss, [params, *partition(outer)[0]])


def _gradients(loss: Tensor | None, leaves: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    if loss is None or not loss.requires_grad:
        return (None,) * len(leaves)
    return torch.autograd.grad(loss, leaves, allow_unused=True)


@torch.no_grad()
def outer_loss_value(
    inner: InnerLoop, params: Tensor, outer: Any, outer_batch: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """(F, its metrics) at θ = `params`, without a derivative."""
    losses, metrics = [], []
    for batch, weight in _pieces(outer_batch):
        loss, reported = detach(inner.outer_loss(params, outer, batch))
        losses.append(params.new_zeros(()) if loss is None else loss * weight)
        metrics.append({name: value * weight for name, value in reported.items()})
    return torch.stack(losses).sum(), {
        name: torch.stack([each[name] for each in metrics]).sum(0) for name in metrics[0]
    }


def outer_loss_slope(inner: InnerLoop, params: Tensor, outer: Any, outer_batch: Any) -> Tensor:
    """∂F/∂θ at θ = `params`, alone."""
    total = torch.zeros_like(params)
    params = params.detach().requires_grad_()
    for batch, weight in _pieces(outer_batch):
        with torch.enable_grad():
            loss, _ = inner.outer_loss(params, outer, batch)
        (slope,) = _gradients(loss, [params])
        if slope is not None:
            total = total + slope * weight
    return total
