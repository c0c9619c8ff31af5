"""The inner loop: one step, and the rollout that records a trajectory without a graph."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import optree
import torch
from optree.integrations.torch import tree_ravel
from torch import Tensor

from bilevel.compiler import Compiler
from bilevel.contract import check_params, check_scalar, settle
from bilevel.errors import ConfigurationError, ProblemError
from bilevel.problem import Problem
from bilevel.random import Key
from bilevel.trajectory import Iterate, Trace, Trajectory, Window, affordable_spacing
from bilevel.tree import detach, to_device

#: Per-step signals of every problem that a truncation schedule may ask for, as functions of the
#: inner gradient; `Problem.signals` supplies further ones.
SIGNALS: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient_norm": torch.linalg.vector_norm,
}


@final
class InnerLoop:
    """The inner optimisation of a `Problem` by a gradient transformation, on one flat vector.

    Args:
        problem: The nested problem.
        optimizer: A `torchopt` or `bilevel.optim` gradient transformation, or a function that
            makes one from the problem's `hyperparameters`.
        compile: Whether steps are run as compiled graphs.

    Raises:
        ConfigurationError: `optimizer` is neither.
    """

    def __init__(self, problem: Problem, optimizer: Any, *, compile: bool = False) -> None:
        self._is_transformation = hasattr(optimizer, "init") and hasattr(optimizer, "update")
        if not self._is_transformation and (
            not callable(optimizer) or hasattr(optimizer, "zero_grad")
        ):
            raise ConfigurationError(
                f"optimizer is a {type(optimizer).__name__}; it must be a gradient transformation "
                "such as bilevel.optim.adam(1e-3) or torchopt.adam(1e-3), or a function that "
                "makes one from the problem's hyperparameters, such as bilevel.optim.sgd"
            )
        self.problem = problem
        self.optimizer = optimizer
        self.compiler = Compiler() if compile else None
        if self._is_transformation:
            settle(optimizer, torch.device("cpu"), check=True)
        self._unravel: Callable[[Tensor], Any] | None = None
        self._structure: Any = None
        self._optimizer_checked = self._is_transformation

    # Pure functions of their arguments, differentiable by autograd and by torch.func.

    def start(self, outer: Any, key: Key, hyperparameters: Mapping[str, Tensor]) -> Iterate:
        """(θ_0, s_0)."""
        params = self.problem.init(outer, generator=key.generator("init"))
        check_params(params)
        flat, unravel = tree_ravel(params)
        structure = (
            optree.tree_structure(params),
            [leaf.shape for leaf in optree.tree_leaves(params)],
        )
        if self._unravel is None:
            self._unravel, self._structure = unravel, structure
        elif structure != self._structure:
            raise ProblemError("init returned parameters of another structure than it did before")
        return Iterate(flat, self._transformation(hyperparameters).init(flat))

    def batch(self, outer: Any, step: int, key: Key) -> Any:
        """B(φ, t) with the randomness of inner step `step`."""
        return self.problem.inner_batch(outer, step, generator=key.generator("inner_batch", step))

    def hyperparameters(self, outer: Any) -> dict[str, Tensor]:
        """h(φ), checked."""
        values = dict(self.problem.hyperparameters(outer))
        if not values and not self._is_transformation:
            raise ConfigurationError(
                f"optimizer is the function {getattr(self.optimizer, '__name__', '')}, but the "
                "problem has no hyperparameters to make it from: call it, as in adam(1e-3)"
            )
        if values and self._is_transformation:
            raise ConfigurationError(
                f"the problem has hyperparameters {sorted(values)}, so optimizer must be a "
                "function that takes them, such as bilevel.optim.sgd, not a finished transformation"
            )
        for name, value in values.items():
            if not isinstance(value, Tensor):
                raise ProblemError(
                    f"hyperparameters()[{name!r}] is a {type(value).__name__}; it must be a tensor"
                )
        return values

    def loss(self, params: Tensor, batch: Any) -> Tensor:
        """ℓ(θ, b) of flat parameters: a scalar."""
        return check_scalar(self.problem.inner_loss(self.unravel(params), batch), "inner_loss")

    def gradient(self, params: Tensor, batch: Any) -> Tensor:
        """∇_θ ℓ(θ, b), which can be differentiated again."""
        return torch.func.grad(self.loss)(params, batch)

    def gradient_without_graph(self, params: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """(∇_θ ℓ(θ, b), ℓ(θ, b)), cheaper, for when they are not differentiated again."""
        params = params.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.loss(params, detach(batch))
        if not loss.requires_grad:
            return torch.zeros_like(params), loss
        (gradient,) = torch.autograd.grad(loss, params, materialize_grads=True)
        return gradient, loss.detach()

    def update(
        self, iterate: Iterate, gradient: Tensor, hyperparameters: Mapping[str, Tensor]
    ) -> Iterate:
        """Φ: the optimizer's step from (θ_t, s_t) with gradient g_t."""
        updates, state = self._transformation(hyperparameters).update(
            gradient, iterate.state, params=iterate.params, inplace=False
        )
        return Iterate(iterate.params + updates, state)

    def step(self, iterate: Iterate, batch: Any, hyperparameters: Mapping[str, Tensor]) -> Iterate:
        """One inner step, which can be differentiated."""
        return self.update(iterate, self.gradient(iterate.params, batch), hyperparameters)

    def outer_loss(
        self, params: Tensor, outer: Any, batch: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(F(θ, φ), the metrics reported beside it)."""
        value = self.problem.outer_loss(self.unravel(params), outer, batch)
        loss, metrics = value if isinstance(value, tuple) else (value, {})
        metrics = {name: torch.as_tensor(metric) for name, metric in metrics.items()}
        return check_scalar(loss, "outer_loss"), metrics

    def unravel(self, params: Tensor) -> Any:
        """Flat parameters as the pytree that `Problem.init` returned."""
        assert self._unravel is not None, "start() comes first"
        return self._unravel(params)

    # Recording and re-running.

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, as one compiled graph if this loop compiles.

        The function must be pure and its arguments and result pytrees of tensors (other arguments
        are constants). The result may be on an autograd graph only in eager mode.
        """
        return function(*args) if self.compiler is None else self.compiler(function, *args)

    def advance(
        self,
        params: Tensor,
        state: Any,
        batch: Any,
        hyperparameters: Mapping[str, Tensor],
        signals: tuple[str, ...] = (),
        outer: Any = None,
    ) -> tuple[Tensor, Any, Tensor, dict[str, Tensor]]:
        """(θ_{t+1}, s_{t+1}, g_t, per-step scalars) from (θ_t, s_t), without a graph.

        `outer` is needed for signals that the problem supplies, and only for these.
        """
        gradient, loss = self.gradient_without_graph(params, batch)
        after = self.update(Iterate(params, state), gradient, hyperparameters)
        recorded = {name: SIGNALS[name](gradient) for name in signals if name in SIGNALS}
        if len(recorded) < len(signals):
            supplied = self.problem.signals(self.unravel(after.params), outer)
            recorded |= {name: supplied[name] for name in signals if name not in SIGNALS}
        return after.params, after.state, gradient, {"inner_loss": loss, **recorded}

    @torch.no_grad()
    def rollout(
        self,
        outer: Any,
        key: Key,
        *,
        steps: int,
        horizon: int,
        signals: Sequence[str] = (),
        keep_from: int = 0,
        keep_every: int | None = None,
        keep_on: torch.device | None = None,
        keep_gradients: bool = False,
    ) -> Trajectory:
        """Run `horizon` inner steps and record them, without a graph.

        Args:
            outer: The outer variables.
            key: The randomness of this run.
            steps: The length T of a full run, of which `horizon` steps are run.
            horizon: How many steps to run, 1 … `steps`.
            signals: Names of per-step scalars to record beside `inner_loss`: of `SIGNALS`, or of
                those that the problem supplies.
            keep_from: The first iterate that a window may start from.
            keep_every: Keep every k-th iterate from there on; the others are recomputed. Default:
                `affordable_spacing`.
            keep_on: Device that holds the kept iterates; default: where they are.
            keep_gradients: Whether kept iterates have their inner gradient with them.

        Raises:
            ConfigurationError: A signal that nothing supplies.
            ProblemError: `init` returned no parameters, or the inner loss is no scalar.
        """
        outer = detach(outer)
        hyperparameters = self.hyperparameters(outer)
        iterate = self.start(outer, key, hyperparameters)
        if keep_every is None:
            one = replace(iterate, gradient=iterate.params) if keep_gradients else iterate
            keep_every = affordable_spacing(one, horizon - keep_from, keep_on)
        of_problem = set(signals) - set(SIGNALS)
        if of_problem:
            self._check_signals(of_problem, self.unravel(iterate.params), outer)
        kept: dict[int, Iterate] = {}
        recorded: dict[str, list[Tensor]] = {"inner_loss": [], **{name: [] for name in signals}}
        for step in range(horizon):
            batch = self.batch(outer, step, key)
            params, optimizer_state, gradient, scalars = self.run(
                self.advance,
                iterate.params,
                iterate.state,
                batch,
                hyperparameters,
                tuple(signals),
                outer if of_problem else None,
            )
            if step >= keep_from and (step - keep_from) % keep_every == 0:
                iterate = replace(iterate, gradient=gradient) if keep_gradients else iterate
                kept[step] = iterate if keep_on is None else _moved(iterate, keep_on)
            iterate = Iterate(params, optimizer_state)
            for name, value in scalars.items():
                recorded[name].append(value)
        kept[horizon] = iterate
        trace = Trace({name: torch.stack(values) for name, values in recorded.items()})
        return Trajectory(kept, key, steps, trace, Window(min(keep_from, horizon - 1), horizon))

    @torch.no_grad()
    def iterate_at(self, trajectory: Trajectory, outer: Any, step: int) -> Iterate:
        """(θ_t, s_t) for any t from the first kept iterate on, recomputed if need be."""
        return self._segment(trajectory, outer, trajectory.last_kept(step), step)[-1]

    def iterates_backward(
        self, trajectory: Trajectory, outer: Any
    ) -> Iterator[tuple[int, Iterate]]:
        """(t, (θ_t, s_t)) for t = stop−1 down to start.

        With every k-th iterate kept, one segment of k is recomputed at a time, from the same
        batches and the same randomness, so the iterates are those of the rollout. Where gradients
        were kept, all but the last iterate of a recomputed segment have theirs.
        """
        step = trajectory.window.stop - 1
        while step >= trajectory.window.start:
            first = trajectory.last_kept(step)
            segment = self._segment(trajectory, outer, first, step)
            while segment and step >= trajectory.window.start:
                yield step, segment.pop()
                step -= 1

    @torch.no_grad()
    def _segment(self, trajectory: Trajectory, outer: Any, first: int, last: int) -> list[Iterate]:
        """The iterates first … last, from the kept one at `first`."""
        outer = detach(outer)
        iterate = trajectory.kept[first]
        device = trajectory.kept[trajectory.horizon].params.device
        segment = [_moved(iterate, device) if iterate.params.device != device else iterate]
        if last > first:
            hyperparameters = self.hyperparameters(outer)
            for step in range(first, last):
                batch = self.batch(outer, step, trajectory.key)
                params, state, gradient, _ = self.run(
                    self.advance, segment[-1].params, segment[-1].state, batch, hyperparameters, ()
                )
                if iterate.gradient is not None:
                    segment[-1] = replace(segment[-1], gradient=gradient)
                segment.append(Iterate(params, state))
        return segment

    def _check_signals(self, names: set[str], params: Any, outer: Any) -> None:
        """Raise unless the problem supplies a scalar for every name."""
        supplied = self.problem.signals(params, outer)
        unknown = names - set(supplied)
        if unknown:
            raise ConfigurationError(
                f"unknown signals {sorted(unknown)}; known: {sorted({*SIGNALS, *supplied})}"
            )
        for name in sorted(names):
            check_scalar(supplied[name], f"signals()[{name!r}]")

    def _transformation(self, hyperparameters: Mapping[str, Tensor]) -> Any:
        if self._is_transformation:
            return self.optimizer
        try:
            transformation = self.optimizer(**hyperparameters)
        except TypeError as error:
            raise ConfigurationError(
                "optimizer could not be made from the problem's hyperparameters "
                f"{sorted(hyperparameters)}: {error}"
            ) from error
        device = next(iter(hyperparameters.values())).device
        settle(transformation, device, check=not self._optimizer_checked)
        self._optimizer_checked = True
        return transformation


def _moved(iterate: Iterate, device: torch.device) -> Iterate:
    gradient = None if iterate.gradient is None else iterate.gradient.to(device)
    return Iterate(iterate.params.to(device), to_device(iterate.state, device), gradient)
