"""The outer loss as a node of somebody else's autograd graph."""

from typing import Any, final

import torch
from torch import Tensor

from bilevel.errors import ProblemError


@final
class Bridge(torch.autograd.Function):
    """F, whose derivative was computed with it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise ProblemError(
            "Hypergradient.loss has no forward derivative: differentiate it by backward()"
        )

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise ProblemError(
                "Hypergradient.loss can be differentiated once: a second derivative of it is not "
                "known (create_graph=True asks for one)"
            )
        return None, None, *(cotangents[0] * grad for grad in ctx.grads)
