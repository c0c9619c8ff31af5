"""The interface between a nested optimisation problem and the rest of the package."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor

from bilevel.errors import ConfigurationError, ProblemError


class Problem(ABC):
    """A nested optimisation problem: what is trained inside, and what is judged outside.

        minimise over φ    F(θ_stop(φ), φ) + Σ_t f_t(θ_{t+1}(φ), φ)
        where              θ_0 = init(φ),   θ_{t+1} = Φ(θ_t, s_t, ∇_θ ℓ(θ_t, B(φ, t)); h(φ, t))

    with F the outer loss and f_t losses along the run, of which a problem has one or both. `φ`
    (`outer`) is a pytree of floating-point tensors, `θ` (`params`) is a pytree of floating-point
    tensors of one dtype, `Φ` is the optimizer given to `Hypergradient`.

    The outer variables reach the inner loss only through the batch: whatever `inner_loss` needs of
    them, `inner_batch` puts there. Each method must be a pure function of its arguments: every
    random draw comes from the `generator` it is given, so that a step can be run again. That is
    checked: docs/contract.md says how. `from_functions` makes a problem without a class.

    Example:
        Gradient descent from 0 towards a point φ that is learned:

        >>> class Towards(bilevel.Problem):
        ...     def init(self, outer, *, generator):
        ...         return torch.zeros(())
        ...
        ...     def inner_batch(self, outer, step, *, generator):
        ...         return outer
        ...
        ...     def inner_loss(self, params, batch):
        ...         return 0.5 * (params - batch) ** 2
        ...
        ...     def outer_loss(self, params, outer, batch):
        ...         return 0.5 * (params - batch) ** 2

        Three steps at a rate of 0.5 give θ = 7φ/8, which is judged against 1:

        >>> hypergradient = bilevel.Hypergradient(Towards(), bilevel.optim.sgd(0.5), steps=3)
        >>> result = hypergradient(torch.tensor(2.0), torch.tensor(1.0))
        >>> result.params, result.loss, result.grads
        (tensor(1.7500), tensor(0.2812), tensor(0.6562))
    """

    @abstractmethod
    def init(self, outer: Any, *, generator: torch.Generator) -> Any:
        """The initial parameters θ_0, a pytree; may depend on `outer` (a learned start)."""

    @abstractmethod
    def inner_batch(self, outer: Any, step: int, *, generator: torch.Generator) -> Any:
        """B(φ, t): the batch of inner step `step`, a pytree.

        Sub-sampling and augmentation belong here. It is differentiated once, never twice.
        """

    @abstractmethod
    def inner_loss(self, params: Any, batch: Any) -> Tensor:
        """ℓ(θ, b): a scalar. The only function that is differentiated twice."""

    def outer_loss(
        self, params: Any, outer: Any, batch: Any
    ) -> Tensor | tuple[Tensor, Mapping[str, Tensor]] | None:
        """F(θ_stop, φ): a scalar, or a pair of a scalar and a dict of tensors worth reporting.

        `batch` is whatever was given to `Hypergradient` as `outer_batch`. Problems with a
        `step_loss` may leave it out.
        """
        return None

    def step_loss(
        self, params: Any, outer: Any, step: int, *, generator: torch.Generator
    ) -> Tensor | None:
        """f_t(θ_{t+1}, φ): a scalar, the loss after inner step t = `step`; none by default.

        Added up over the steps of the window. Backpropagation through time of a recurrent network,
        the training of a learned optimizer, and multi-step MAML have losses along the run.
        """
        return None

    def hyperparameters(self, outer: Any, step: int) -> Mapping[str, Any]:
        """h(φ, t): what the optimizer of inner step t = `step` is made from; none by default.

        By name, each a tensor, or a pytree of tensors like the parameters or like the upper part of
        their tree: a learning rate for each layer, say. When there are any, `Hypergradient` must be
        given a function that makes the optimizer from them: `optimizer=bilevel.optim.sgd` with
        `hyperparameters` returning `{"lr": ...}`.
        """
        return {}

    def signals(self, params: Any, outer: Any) -> Mapping[str, Tensor]:
        """Scalars of an iterate that a truncation schedule may ask for by name; none by default.

        Called with θ_{t+1} after step t, if the schedule asks for any of them. What they compare
        the iterate with, such as a target that changes from one outer step to the next, belongs
        in `outer`.
        """
        return {}

    @staticmethod
    def from_functions(
        *,
        init: Callable[..., Any],
        inner_loss: Callable[..., Any],
        outer_loss: Callable[..., Any] | None = None,
        inner_batch: Callable[..., Any] | None = None,
        step_loss: Callable[..., Any] | None = None,
        hyperparameters: Callable[..., Any] | None = None,
        signals: Callable[..., Any] | None = None,
    ) -> "Problem":
        """A problem made of plain functions, each with the arguments of the method of its name.

        `generator` is passed to those that have a parameter of this name. Without `inner_batch`,
        the batch is φ itself.

        Raises:
            ConfigurationError: There is neither an outer loss nor one along the run, or a function
                does not take the arguments of its method.

        Example:
            >>> problem = bilevel.Problem.from_functions(
            ...     init=lambda outer: torch.zeros(()),
            ...     inner_loss=lambda params, batch: 0.5 * (params - batch) ** 2,
            ...     outer_loss=lambda params, outer, batch: 0.5 * (params - batch) ** 2,
            ... )
            >>> hypergradient = bilevel.Hypergradient(problem, bilevel.optim.sgd(0.5), steps=3)
            >>> hypergradient(torch.tensor(2.0), torch.tensor(1.0)).grads
            tensor(0.6562)
        """
        return _OfFunctions(
            init=init,
            inner_batch=_outer_itself if inner_batch is None else inner_batch,
            inner_loss=inner_loss,
            outer_loss=outer_loss,
            step_loss=step_loss,
            hyperparameters=hyperparameters,
            signals=signals,
        )


def overrides(problem: Problem, name: str) -> bool:
    """Whether a problem has a method of its own where `Problem` has a default."""
    return getattr(getattr(problem, name), "__func__", None) is not getattr(Problem, name)


def check_signatures(problem: Problem) -> None:
    """Raise `ProblemError` unless every method takes the arguments that it is called with."""
    for name, (count, has_generator) in _ARGUMENTS.items():
        if not callable(getattr(problem, name)):
            raise ProblemError(
                f"{type(problem).__name__}.{name} is {getattr(problem, name)!r}; it must be a "
                f"method that takes {_shown(name)}"
            )
        signature = _signature(getattr(problem, name))
        if signature is None:
            continue
        try:
            signature.bind(*(None,) * count, **({"generator": None} if has_generator else {}))
        except TypeError as error:
            raise ProblemError(
                f"{type(problem).__name__}.{name} must take {_shown(name)}, as in Problem: {error}"
            ) from error


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """None where a function does not tell, as some written in C do not."""
    try:
        return inspect.signature(function)
    except ValueError:
        return None


def _shown(method: str) -> str:
    """The arguments of a method as they are written."""
    return f"({', '.join(list(inspect.signature(getattr(Problem, method)).parameters)[1:])})"


def _outer_itself(outer: Any, step: int) -> Any:
    return outer


#: The positional arguments of every method, and whether it also gets a generator.
_ARGUMENTS = {
    "init": (1, True),
    "inner_batch": (2, True),
    "inner_loss": (2, False),
    "outer_loss": (3, False),
    "step_loss": (3, True),
    "hyperparameters": (2, False),
    "signals": (2, False),
}


@final
class _OfFunctions(Problem):
    """The methods are attributes of the object; those that were not given are `Problem`'s."""

    def __init__(self, **functions: Callable[..., Any] | None) -> None:
        for name, function in functions.items():
            if function is not None or name in ("init", "inner_loss"):
                setattr(self, name, _Method(name, function))

    def init(self, outer: Any, *, generator: torch.Generator) -> Any:
        raise NotImplementedError

    def inner_batch(self, outer: Any, step: int, *, generator: torch.Generator) -> Any:
        raise NotImplementedError

    def inner_loss(self, params: Any, batch: Any) -> Tensor:
        raise NotImplementedError


@final
class _Method:
    """A function that stands for a method; a generator is passed on if it takes one."""

    def __init__(self, name: str, function: Callable[..., Any] | None) -> None:
        count, has_generator = _ARGUMENTS[name]
        if not callable(function):
            raise ConfigurationError(f"{name}={function!r}: it must be a function")
        signature = _signature(function)
        parameters = {} if signature is None else signature.parameters
        self._function = function
        takes_generator = has_generator and (
            "generator" in parameters or any(x.kind is x.VAR_KEYWORD for x in parameters.values())
        )
        self._drops_generator = has_generator and not takes_generator
        try:
            if signature is not None:
                signature.bind(*(None,) * count, **({"generator": None} if takes_generator else {}))
        except TypeError as error:
            raise ConfigurationError(
                f"{name} must take the arguments of Problem.{name}, {_shown(name)}, of which "
                f"generator may be left out: {error}"
            ) from error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._drops_generator:
            kwargs.pop("generator")
        return self._function(*args, **kwargs)
