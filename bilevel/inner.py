"""The inner loop: one step of it, as pure functions of flat parameters."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from bilevel.compiler import Compiler
from bilevel.contract import check_hyperparameters, check_params, check_scalar
from bilevel.errors import ConfigurationError, ProblemError
from bilevel.optim.base import on_vector
from bilevel.optim.foreign import check_differentiable, settle
from bilevel.problem import Problem, overrides
from bilevel.random import Key
from bilevel.trajectory import Iterate
from bilevel.tree import Layout, detach

#: Called with the name of a method, what it returned, and its arguments.
Examine = Callable[[str, Any, Any], None]

#: Per-step signals of every problem that a truncation schedule may ask for, as functions of the
#: inner gradient; `Problem.signals` supplies further ones.
SIGNALS: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient_norm": torch.linalg.vector_norm,
}


class StepInputs(NamedTuple):
    """What inner step t takes of φ.

    Attributes:
        batch: b_t = B(φ, t), a pytree.
        hyperparameters: h_t = h(φ, t), by name; each a tensor or a pytree of tensors.
    """

    batch: Any
    hyperparameters: dict[str, Any]


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
        ProblemError: `hyperparameters` does not take (outer, step).
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
        _check_signature(problem)
        self.problem = problem
        self.optimizer = optimizer
        self.compiler = Compiler() if compile else None
        self.has_step_loss = overrides(problem, "step_loss")
        self.has_outer_loss = overrides(problem, "outer_loss")
        self._has_hyperparameters = overrides(problem, "hyperparameters")
        self._layout: Layout | None = None
        self._settled = False
        self._finished: tuple[GradientTransformation, bool] | None = None
        self._examined: tuple[Examine | None, tuple[str, ...]] = (None, ())
        if self._is_transformation:
            self._settle(optimizer, torch.device("cpu"))

    def start(self, outer: Any, key: Key, hyperparameters: Mapping[str, Any]) -> Iterate:
        """(θ_0, s_0)."""
        params = self.problem.init(outer, generator=key.generator("init"))
        check_params(params)
        self._examine("init", params, outer)
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
        batch = self.problem.inner_batch(outer, step, generator=key.generator("inner_batch", step))
        self._examine("inner_batch", batch, outer)
        return StepInputs(batch, self.hyperparameters(outer, step))

    def hyperparameters(self, outer: Any, step: int) -> dict[str, Any]:
        """h(φ, t), checked."""
        values = (
            dict(self.problem.hyperparameters(outer, step)) if self._has_hyperparameters else {}
        )
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
        check_hyperparameters(values)
        self._examine("hyperparameters", values, outer)
        return values

    def loss(self, params: Tensor, batch: Any) -> Tensor:
        """ℓ(θ, b) of flat parameters: a scalar."""
        loss = check_scalar(self.problem.inner_loss(self.unravel(params), batch), "inner_loss")
        self._examine("inner_loss", loss, (params, batch))
        return loss

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
            updates = self._layout_now.ravel(updates)
        return Iterate(iterate.params + updates, state)

    def step(self, iterate: Iterate, inputs: StepInputs) -> Iterate:
        """One inner step, under any transform of `torch.func`."""
        gradient = self.gradient(iterate.params, inputs.batch)
        return self.update(iterate, gradient, inputs.hyperparameters)

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
            supplied = self.problem.signals(self.unravel(after), outer)
            recorded |= {name: supplied[name] for name in names if name not in SIGNALS}
        return recorded

    def outer_loss(
        self, params: Tensor, outer: Any, batch: Any
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """(F(θ, φ), the metrics reported beside it); None where the problem has no such loss."""
        with self._graph_to_examine("outer_loss"):
            value = self.problem.outer_loss(self.unravel(params), outer, batch)
        if value is None and self.has_step_loss:
            return None, {}
        loss, metrics = value if isinstance(value, tuple) else (value, {})
        check_scalar(loss, "outer_loss")
        self._examine("outer_loss", loss, (params, outer, batch))
        return loss, {name: torch.as_tensor(metric) for name, metric in metrics.items()}

    def step_loss(self, params: Tensor, outer: Any, step: int, key: Key) -> Tensor:
        """f_t(θ_{t+1}, φ), t = `step`, for problems that have losses along the run."""
        generator = key.generator("step_loss", step)
        with self._graph_to_examine("step_loss"):
            value = self.problem.step_loss(self.unravel(params), outer, step, generator=generator)
        loss = check_scalar(value, "step_loss")
        self._examine("step_loss", loss, (params, outer))
        return loss

    @contextmanager
    def examined(self, examine: Examine | None, *methods: str) -> Iterator[None]:
        """Inside, show `examine` what these methods of the problem return and were given."""
        before, self._examined = self._examined, (examine, methods)
        try:
            yield
        finally:
            self._examined = before

    def _examine(self, method: str, returned: Any, arguments: Any) -> None:
        examine, methods = self._examined
        if examine is not None and method in methods:
            examine(method, returned, arguments)

    def _graph_to_examine(self, method: str) -> Any:
        """Where what a method returns is examined, it needs its graph, asked for or not."""
        wanted = self._examined[0] is not None and method in self._examined[1]
        return torch.enable_grad() if wanted else nullcontext()

    def check_optimizer(self, hyperparameters: Mapping[str, Any]) -> None:
        """Try an optimizer from elsewhere: is its derivative that of what it computes?

        Raises:
            ConfigurationError: It is not, so that every hypergradient would be wrong.
        """
        if not self._transformation(hyperparameters)[1]:
            made_of = None if self._is_transformation else hyperparameters
            example = self._layout_now.example
            check_differentiable(self.optimizer, example, hyperparameters=made_of)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, as one compiled graph if this loop compiles.

        The function must be pure and its arguments and result pytrees of tensors (other arguments
        are constants). The result may be on an autograd graph only in eager mode.
        """
        return function(*args) if self.compiler is None else self.compiler(function, *args)

    def unravel(self, params: Tensor) -> Any:
        """Flat parameters as the pytree that `Problem.init` returned."""
        return self._layout_now.unravel(params)

    @property
    def _layout_now(self) -> Layout:
        assert self._layout is not None, "start() comes first"
        return self._layout

    def _transformation(
        self, hyperparameters: Mapping[str, Any]
    ) -> tuple[GradientTransformation, bool]:
        """(the optimizer, whether it is for the flat vector)."""
        if self._finished is not None:
            return self._finished
        transformation = self.optimizer
        if not self._is_transformation:
            try:
                transformation = self.optimizer(**hyperparameters)
            except TypeError as error:
                raise ConfigurationError(
                    "optimizer could not be made from the problem's hyperparameters "
                    f"{sorted(hyperparameters)}: {error}"
                ) from error
            self._settle(transformation, self._layout_now.device)
        of_vector = on_vector(transformation, self._layout_now.example)
        made = (transformation, False) if of_vector is None else (of_vector, True)
        if self._is_transformation:
            self._finished = made
        return made

    def _settle(self, transformation: Any, device: torch.device) -> None:
        settle(transformation, device, check=not self._settled)
        self._settled = True


def _check_signature(problem: Problem) -> None:
    """Raise `ProblemError` unless `hyperparameters` takes (outer, step)."""
    try:
        inspect.signature(problem.hyperparameters).bind(None, 0)
    except TypeError as error:
        raise ProblemError(
            f"{type(problem).__name__}.hyperparameters must take (outer, step): what it returns "
            f"may differ from one inner step to the next ({error})"
        ) from error
