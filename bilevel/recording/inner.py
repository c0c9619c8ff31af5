"""The inner loop: one step of it, as pure functions of flat parameters."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, final

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from bilevel.checks import check_hyperparameters, check_metrics, check_params, check_scalar
from bilevel.compiler import Compiler
from bilevel.errors import ConfigurationError, ProblemError
from bilevel.optim.base import on_vector
from bilevel.optim.foreign import check_differentiable, differentiable_form, settle
from bilevel.problem import Problem, check_signatures, overrides
from bilevel.random import Key
from bilevel.tree import Layout, detach
from bilevel.variables import Iterate, StepInputs

#: Calls a method of the problem in the inner loop's stead: its name, it, its arguments by position
#: and by name.
Watch = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_AT_ITS_END = "an iterator that it reads is at its end: begin it anew, as itertools.cycle does"
#: Per-step signals of every problem that a truncation schedule may ask for, as functions of the
#: inner gradient; `Problem.signals` supplies further ones.
SIGNALS: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient_norm": torch.linalg.vector_norm,
}


@final
class InnerLoop:
    """The inner optimisation of a `Problem` by a gradient transformation.

    Parameters are one flat vector here; the problem sees the pytree that its `init` returned, and
    so does an optimizer, unless it is one of `bilevel.optim` that gives the same on the vector.
    Every method is a function of its arguments alone, which autograd can differentiate. What is
    fixed by the first `start` is the layout of the parameters.

    Args:
        problem: The nested problem.
        optimizer: A `torchopt` or `bilevel.optim` gradient transformation, or a function that
            makes one from the problem's `hyperparameters`.
        compile: Whether steps are run as compiled graphs.

    Attributes:
        has_step_loss: Whether the problem has losses along the run.
        has_outer_loss: Whether it has one at the end.

    Raises:
        ConfigurationError: `optimizer` is neither.
        ProblemError: A method of the problem does not take the arguments that it is given.
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
        check_signatures(problem)
        self.problem = problem
        self.optimizer = differentiable_form(optimizer)
        self.compiler = Compiler() if compile else None
        self.has_step_loss = overrides(problem, "step_loss")
        self.has_outer_loss = overrides(problem, "outer_loss")
        self._has_hyperparameters = overrides(problem, "hyperparameters")
        self._layout: Layout | None = None
        self._settled = False
        self._finished: tuple[GradientTransformation, bool] | None = None
        self._watch: tuple[Watch | None, tuple[str, ...]] = (None, ())
        if self._is_transformation:
            self._settle(self.optimizer, torch.device("cpu"))

    def start(self, outer: Any, key: Key, hyperparameters: Mapping[str, Any]) -> Iterate:
        """(θ_0, s_0)."""
        params = self._call("init", outer, generator=key.generator("init"))
        check_params(params)
        layout = Layout.of(params)
        if self._layout is None:
            self._layout = layout
        elif layout != self._layout:
            raise ProblemError("init returned parameters of another structure than it did before")
        flat = layout.ravel(params)
        transformation, of_vector = self._transformation(hyperparameters)
        return Iterate(flat, transformation.init(flat if of_vector else self.unravel(flat)))

    def inputs(self, outer: Any, step: int, key: Key) -> StepInputs:
        """(b_t, h_t) with the randomness of inner step t = `step`."""
        generator = key.generator("inner_batch", step)
        batch = self._call("inner_batch", outer, step, generator=generator)
        return StepInputs(batch, self.hyperparameters(outer, step))

    def hyperparameters(self, outer: Any, step: int) -> dict[str, Any]:
        """h(φ, t), checked."""
        values = {}
        if self._has_hyperparameters:
            values = check_hyperparameters(self._call("hyperparameters", outer, step))
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
        return values

    def loss(self, params: Tensor, batch: Any) -> Tensor:
        """ℓ(θ, b) of flat parameters: a scalar."""
        return check_scalar(self._call("inner_loss", self.unravel(params), batch), "inner_loss")

    def gradient(self, params: Tensor, batch: Any) -> Tensor:
        """∇_θ ℓ(θ, b), under any transform of `torch.func`."""
        return torch.func.grad(self.loss)(params, batch)

    def gradient_with_graph(self, params: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """(∇_θ ℓ(θ, b), ℓ(θ, b)) on the graph of θ, which requires a gradient, and of b."""
        loss = self.loss(params, batch)
        if not loss.requires_grad:
            return torch.zeros_like(params), loss
        (gradient,) = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
        return gradient, loss

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
        self, iterate: Iterate, gradient: Tensor, hyperparameters: Mapping[str, Any]
    ) -> Iterate:
        """Φ: the optimizer's step from (θ_t, s_t) with gradient g_t."""
        transformation, of_vector = self._transformation(hyperparameters)
        if of_vector:
            updates, state = transformation.update(
                gradient, iterate.state, params=iterate.params, inplace=False
            )
        else:
            updates, state = transformation.update(
                self.unravel(gradient),
                iterate.state,
                params=self.unravel(iterate.params),
                inplace=False,
            )
            updates = self.layout.ravel(updates)
        return Iterate(iterate.params + updates, state)

    def step(self, iterate: Iterate, inputs: StepInputs) -> Iterate:
        """One inner step, under any transform of `torch.func`."""
        gradient = self.gradient(iterate.params, inputs.batch)
        return self.update(iterate, gradient, inputs.hyperparameters)

    def step_on_leaves(
        self, leaves: list[Tensor], state: Any, inputs: StepInputs
    ) -> tuple[list[Tensor], Any, Tensor]:
        """(the leaves of θ_{t+1}, s_{t+1}, ℓ) on the graph of those of θ_t.

        For optimizers that begin without a tensor in their state: with so little to compute for
        each leaf, that is faster than cutting up a vector and joining it.
        """
        tree = self.layout.unflatten(leaves)
        loss = check_scalar(self._call("inner_loss", tree, inputs.batch), "inner_loss")
        gradients = tuple(map(torch.zeros_like, leaves))
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        updates, state = self._made(inputs.hyperparameters).update(
            self.layout.unflatten(gradients), state, params=tree, inplace=False
        )
        changes = self.layout.flatten(updates)
        return [leaf + change for leaf, change in zip(leaves, changes, strict=True)], state, loss

    def advance(
        self,
        params: Tensor,
        state: Any,
        inputs: StepInputs,
        signals: tuple[str, ...] = (),
        outer: Any = None,
    ) -> tuple[Tensor, Any, Tensor, dict[str, Tensor]]:
        """(θ_{t+1}, s_{t+1}, g_t, per-step scalars) from (θ_t, s_t), without a graph.

        `outer` is needed for signals that the problem supplies, and only for these.
        """
        gradient, loss = self.gradient_without_graph(params, inputs.batch)
        after = self.update(Iterate(params, state), gradient, inputs.hyperparameters)
        scalars = {"inner_loss": loss, **self.signals(signals, gradient, after.params, outer)}
        return after.params, after.state, gradient, scalars

    def signals(
        self, names: tuple[str, ...], gradient: Tensor, after: Tensor, outer: Any
    ) -> dict[str, Tensor]:
        """The per-step scalars of these names, from g_t and θ_{t+1}."""
        recorded = {name: SIGNALS[name](gradient) for name in names if name in SIGNALS}
        if len(recorded) < len(names):
            supplied = self._call("signals", self.unravel(after), outer)
            recorded |= {name: supplied[name].detach() for name in names if name not in SIGNALS}
        return recorded

    def outer_loss(
        self, params: Tensor, outer: Any, batch: Any
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """(F(θ, φ), the metrics reported beside it); None where the problem has no such loss."""
        value = self._call("outer_loss", self.unravel(params), outer, batch)
        if value is None and self.has_step_loss:
            return None, {}
        loss, metrics = check_metrics(value) if isinstance(value, tuple) else (value, {})
        return check_scalar(loss, "outer_loss"), metrics

    def step_loss(self, params: Tensor, outer: Any, step: int, key: Key) -> Tensor:
        """f_t(θ_{t+1}, φ), t = `step`, for problems that have losses along the run; 0 for None."""
        generator = key.generator("step_loss", step)
        value = self._call("step_loss", self.unravel(params), outer, step, generator=generator)
        return params.new_zeros(()) if value is None else check_scalar(value, "step_loss")

    @contextmanager
    def watched(self, watch: Watch | None, *methods: str) -> Iterator[None]:
        """Inside, these methods of the problem are called by `watch`."""
        before, self._watch = self._watch, (watch, methods)
        try:
            yield
        finally:
            self._watch = before

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """What a method of the problem returns; autograd is on, as it may differentiate itself."""
        watch, methods = self._watch
        method = getattr(self.problem, name)
        try:
            with nullcontext() if torch.is_grad_enabled() else torch.enable_grad():
                if watch is not None and name in methods:
                    return watch(name, method, args, kwargs)
                return method(*args, **kwargs)
        except StopIteration as error:  # Python may take it for the end of a loop of ours.
            raise ProblemError(f"{name} raised StopIteration: {_AT_ITS_END}") from error

    def check_optimizer(self, hyperparameters: Mapping[str, Any]) -> None:
        """Try an optimizer that is not all ours: is its derivative that of what it computes?

        Args:
            hyperparameters: h_t; those that are learned require a gradient.

        Raises:
            ConfigurationError: It is not, so that every hypergradient would be wrong.
        """
        made_of = None if self._is_transformation else hyperparameters
        maker = getattr(self.optimizer, "func", self.optimizer)  # Of a functools.partial.
        is_ours = made_of is None or getattr(maker, "__module__", "").startswith("bilevel.optim")
        if not (is_ours and self._transformation(hyperparameters)[1]):
            example = self.layout.example
            check_differentiable(self.optimizer, example, hyperparameters=made_of)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, as one compiled graph if this loop compiles.

        The function must be pure and its arguments and result pytrees of tensors (other arguments
        are constants). The result may be on an autograd graph only in eager mode.
        """
        return function(*args) if self.compiler is None else self.compiler(function, *args)

    def scan(self, step: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
        """A loop of this loop's steps as one compiled graph: `Compiler.scan`."""
        assert self.compiler is not None
        return self.compiler.scan(step, *args)

    def unravel(self, params: Tensor) -> Any:
        """Flat parameters as the pytree that `Problem.init` returned."""
        return self.layout.unravel(params)

    @property
    def layout(self) -> Layout:
        """How the pytree lies in the vector."""
        assert self._layout is not None, "start() comes first"
        return self._layout

    def _transformation(
        self, hyperparameters: Mapping[str, Any]
    ) -> tuple[GradientTransformation, bool]:
        """(the optimizer, whether it is for the flat vector)."""
        if self._finished is not None:
            return self._finished
        transformation = self._made(hyperparameters)
        of_vector = on_vector(transformation, self.layout.example)
        made = (transformation, False) if of_vector is None else (of_vector, True)
        if self._is_transformation:
            self._finished = made
        return made

    def _made(self, hyperparameters: Mapping[str, Any]) -> GradientTransformation:
        """The optimizer for the pytree of parameters."""
        if self._is_transformation:
            return self.optimizer
        try:
            transformation = differentiable_form(self.optimizer(**hyperparameters))
        except (TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(
                "optimizer could not be made from the problem's hyperparameters "
                f"{sorted(hyperparameters)}: {error}"
            ) from error
        self._settle(transformation, self.layout.device)
        return transformation

    def _settle(self, transformation: Any, device: torch.device) -> None:
        settle(transformation, device, check=not self._settled)
        self._settled = True
