"""The interface between a nested optimisation problem and the rest of the package."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Problem(ABC):
    """A nested optimisation problem: what is trained inside, and what is judged outside.

        minimise over φ    F(θ_stop(φ), φ)
        where              θ_0 = init(φ),   θ_{t+1} = Φ(θ_t, s_t, ∇_θ ℓ(θ_t, B(φ, t)); h(φ))

    `φ` (`outer`) is a pytree of floating-point tensors, `θ` (`params`) is a pytree of
    floating-point tensors of one dtype, `Φ` is the optimizer given to `Hypergradient`.

    The outer variables reach the inner loss only through the batch: whatever `inner_loss` needs of
    them, `inner_batch` puts there. Each method must be a pure function of its arguments: every
    random draw comes from the `generator` it is given, so that a step can be run again.

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

    @abstractmethod
    def outer_loss(
        self, params: Any, outer: Any, batch: Any
    ) -> Tensor | tuple[Tensor, Mapping[str, Tensor]]:
        """F(θ, φ): a scalar, or a pair of a scalar and a dict of tensors worth reporting.

        `batch` is whatever was given to `Hypergradient` as `outer_batch`.
        """

    def hyperparameters(self, outer: Any) -> Mapping[str, Tensor]:
        """h(φ): keyword arguments for the optimizer that depend on `outer`; none by default.

        When there are any, `Hypergradient` must be given a function that makes the optimizer from
        them: `optimizer=bilevel.optim.sgd` with `hyperparameters` returning `{"lr": ...}`.
        """
        return {}

    def signals(self, params: Any, outer: Any) -> Mapping[str, Tensor]:
        """Scalars of an iterate that a truncation schedule may ask for by name; none by default.

        Called with θ_{t+1} after step t, if the schedule asks for any of them. What they compare
        the iterate with, such as a target that changes from one outer step to the next, belongs
        in `outer`.
        """
        return {}
