"""One hypergradient of an `InnerProblem` by this library and by others of PyTorch.

Each method takes a problem and returns a function that makes one hypergradient, a list in the order
of `InnerProblem.outer`, or raises `NotOffered` where the library has no way to say the problem.
"""

from collections.abc import Callable
from typing import Any

import torch
from inner_boat import unrolled_by_boat
from inner_problem import Call, InnerProblem, Params
from torch import Tensor
from torch.autograd import grad

import bilevel

BETAS, EPS, EPS_ROOT = (0.9, 0.999), 1e-8, 1e-12


def plain(problem: InnerProblem) -> Call:
    """The loop one would write: record the window with its graph, differentiate it once."""
    outer = problem.leaves()

    def call() -> list[Tensor]:
        params, velocity, square = begin(problem, outer), None, None
        first = problem.steps - problem.window
        for step in range(problem.steps):
            recorded = step >= first
            if not recorded or step == first > 0:
                params = cut(params)
            loss = problem.inner_loss(params, problem.batch(outer, step))
            gradient = grad(loss, list(params.values()), create_graph=recorded)
            rate = rate_of(problem, outer, step)
            if problem.optimizer == "adam":
                velocity = ema(velocity, gradient, BETAS[0])
                square = ema(square, [each * each for each in gradient], BETAS[1])
                scale = rate / (1 - BETAS[0] ** (step + 1))
                correction = 1 - BETAS[1] ** (step + 1)
                moves = [
                    scale * m / ((v / correction + EPS_ROOT).sqrt() + EPS)
                    for m, v in zip(velocity, square, strict=True)
                ]
            else:
                if problem.momentum and velocity is not None:
                    gradient = [
                        problem.momentum * v + g for v, g in zip(velocity, gradient, strict=True)
                    ]
                velocity = list(gradient)
                moves = [rate * each for each in velocity]
            params = {
                name: value - move
                for (name, value), move in zip(params.items(), moves, strict=True)
            }
        return list(grad(problem.outer_loss(params, outer), list(outer.values())))

    return call


def begin(problem: InnerProblem, outer: Params) -> Params:
    """θ_0 as leaves, or on the graph of φ."""
    params = problem.init(outer)
    return {
        name: v if v.requires_grad else v.clone().requires_grad_() for name, v in params.items()
    }


def cut(params: Params) -> Params:
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def ema(average: list[Tensor] | None, values: Any, decay: float) -> list[Tensor]:
    if average is None:
        return [(1 - decay) * value for value in values]
    return [decay * a + (1 - decay) * value for a, value in zip(average, values, strict=True)]


def rate_of(problem: InnerProblem, outer: Params, step: int) -> Any:
    learned = problem.learned_rate(outer, step)
    return problem.rate if learned is None else learned


def higher(problem: InnerProblem) -> Call:
    """`higher.optim`'s differentiable optimizers, without its copy of a module."""
    import higher

    outer = problem.leaves()

    def call() -> list[Tensor]:
        params = begin(problem, outer)
        names, values = list(params), list(params.values())
        own = [torch.nn.Parameter(value.detach()) for value in values]
        if problem.optimizer == "adam":
            optimizer: Any = torch.optim.Adam(own, lr=problem.rate, betas=BETAS, eps=EPS)
        else:
            optimizer = torch.optim.SGD(own, lr=problem.rate, momentum=problem.momentum)

        def differentiable(track: bool) -> Any:
            return higher.optim.get_diff_optim(optimizer, own, track_higher_grads=track)

        first = problem.steps - problem.window
        loop = differentiable(first == 0)
        for step in range(problem.steps):
            if step == first > 0:
                values, loop = list(cut(dict(enumerate(values))).values()), differentiable(True)
            loss = problem.inner_loss(
                dict(zip(names, values, strict=True)), problem.batch(outer, step)
            )
            rate = problem.learned_rate(outer, step)
            override = None if rate is None else {"lr": [rate]}
            values = list(loop.step(loss, params=values, override=override))
        loss = problem.outer_loss(dict(zip(names, values, strict=True)), outer)
        return list(grad(loss, list(outer.values())))

    return call


def torchopt(problem: InnerProblem) -> Call:
    """`torchopt`'s functional optimizers, which `MetaSGD` and `MetaAdam` are made of."""
    import torchopt as library

    outer = problem.leaves()

    def optimizer(step: int) -> Any:
        rate = rate_of(problem, outer, step)
        if problem.optimizer == "adam":
            return library.adam(rate, BETAS, EPS, eps_root=EPS_ROOT, moment_requires_grad=True)
        return library.sgd(rate, problem.momentum, moment_requires_grad=problem.momentum > 0)

    def call() -> list[Tensor]:
        params = begin(problem, outer)
        first = problem.steps - problem.window
        loop = optimizer(0)
        state = loop.init(params)
        for step in range(problem.steps):
            recorded = step >= first
            if not recorded or step == first > 0:
                params = cut(params)
            loop = optimizer(step) if problem.scheduled else loop
            loss = problem.inner_loss(params, problem.batch(outer, step))
            gradient = grad(loss, list(params.values()), create_graph=recorded)
            updates, state = loop.update(
                dict(zip(params, gradient, strict=True)), state, params=params, inplace=False
            )
            params = library.apply_updates(params, updates, inplace=False)
        return list(grad(problem.outer_loss(params, outer), list(outer.values())))

    return call


class AsProblem(bilevel.Problem):
    """An `InnerProblem` for this library."""

    def __init__(self, problem: InnerProblem) -> None:
        self.problem = problem

    def init(self, outer: Params, *, generator: torch.Generator) -> Params:
        return self.problem.init(outer)

    def inner_batch(self, outer: Params, step: int, *, generator: torch.Generator) -> Params:
        return self.problem.batch(outer, step)

    def inner_loss(self, params: Params, batch: Params) -> Tensor:
        return self.problem.inner_loss(params, batch)

    def outer_loss(self, params: Params, outer: Params, batch: None) -> Tensor:
        return self.problem.outer_loss(params, outer)

    def hyperparameters(self, outer: Params, step: int) -> Params:
        rate = self.problem.learned_rate(outer, step)
        return {} if rate is None else {"lr": rate}


def ours(problem: InnerProblem, **settings: Any) -> Call:
    """This library, by its defaults."""
    outer = problem.leaves()
    if problem.optimizer == "adam":
        optimizer: Any = bilevel.optim.adam
    else:
        optimizer = bilevel.optim.sgd
    if problem.learned_rate(outer, 0) is None:
        extra = {} if problem.optimizer == "adam" else {"momentum": problem.momentum}
        optimizer = optimizer(problem.rate, **extra)
    made = bilevel.Hypergradient(
        AsProblem(problem),
        optimizer,
        steps=problem.steps,
        truncation=(
            bilevel.truncation.Last(problem.window) if problem.window < problem.steps else None
        ),
        **settings,
    )

    def call() -> list[Tensor]:
        return list(made(outer).grads.values())

    return call


def compiled(problem: InnerProblem) -> Call:
    """This library with `compile=True`."""
    return ours(problem, compile=True)


METHODS: dict[str, Callable[[InnerProblem], Call]] = {
    "plain": plain,
    "higher": higher,
    "torchopt": torchopt,
    "boat": unrolled_by_boat,
    "ours": ours,
    "compiled": compiled,
}
