"""Hyperparameter optimisation: one weight decay for each of 650 parameters.

A softmax regression is trained on 200 digits. Its 650 logarithms of weight decays are tuned on 600
others, and judged on the rest, which nothing else looks at.

Estimator: `Implicit`, because the inner problem is strictly convex and is run to its optimum: the
hypergradient there is one linear solve, and does not depend on the length of the run. `Adjoint`
goes back through every step for the same number. Searches need no gradient, but with one number
for each trial they can tune one shared decay, not 650.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel

STEPS = 150
SGD = bilevel.optim.sgd(lr=0.3, momentum=0.9, nesterov=True)
#: Of log decays; with less, the inner run would not reach its optimum.
RANGE = (-7.0, 0.0)


class WeightDecays(bilevel.Problem):
    """Softmax regression with a penalty of its own for each parameter."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def init(self, outer: dict[str, Tensor], *, generator: torch.Generator) -> Tensor:
        return torch.zeros(65, 10)

    def inner_batch(
        self, outer: dict[str, Tensor], step: int, *, generator: torch.Generator
    ) -> Tensor:
        return outer["log_decay"].exp()

    def inner_loss(self, params: Tensor, batch: Tensor) -> Tensor:
        fit = cross_entropy(self.images @ params, self.labels)
        return fit + 0.5 * (batch * params**2).sum()

    def outer_loss(
        self, params: Tensor, outer: dict[str, Tensor], batch: tuple[Tensor, Tensor]
    ) -> Tensor:
        images, labels = batch
        return cross_entropy(images @ params, labels)


def tune(
    problem: WeightDecays,
    validation: tuple[Tensor, Tensor],
    estimator: bilevel.estimators.Estimator,
    trials: int,
) -> tuple[Tensor, list[float]]:
    """Gradient descent on the decays: (the best of them, the validation loss of every trial)."""
    outer = {"log_decay": torch.full((65, 10), -4.0, requires_grad=True)}
    optimizer = torch.optim.Adam(outer.values(), lr=0.3)
    hypergradient = bilevel.Hypergradient(problem, SGD, STEPS, estimator=estimator)
    losses, best = [], outer["log_decay"].detach().clone()
    for _ in range(trials):
        optimizer.zero_grad()
        tried = outer["log_decay"].detach().clone()
        losses.append(float(hypergradient.backward(outer, validation).loss))
        best = tried if losses[-1] == min(losses) else best
        optimizer.step()
        with torch.no_grad():
            outer["log_decay"].clamp_(*RANGE)
    return best, losses


def search(
    problem: WeightDecays, validation: tuple[Tensor, Tensor], decays: list[Tensor]
) -> tuple[Tensor, list[float]]:
    """Train with each of `decays`: (the best of them, the validation loss of every trial)."""
    losses = []
    for decay in decays:
        params = train(problem, decay)
        losses.append(float(problem.outer_loss(params, {}, validation)))
    return decays[losses.index(min(losses))], losses


def train(problem: WeightDecays, log_decay: Tensor) -> Tensor:
    """The parameters after an inner run, without a hypergradient."""
    inner = bilevel.InnerLoop(problem, SGD)
    run = bilevel.record(
        inner, {"log_decay": log_decay}, bilevel.Key(0), steps=STEPS, keep_from=STEPS - 1
    )
    return inner.unravel(run.kept[STEPS].params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer trials")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    options = parser.parse_args()
    trials = 12 if options.quick else 40

    torch.manual_seed(0)
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = torch.cat([images.float() / 16, torch.ones(len(images), 1)], dim=1)
    training, validation, test = torch.randperm(len(images)).split([200, 600, len(images) - 800])
    problem = WeightDecays(images[training], labels[training])
    held_out = images[validation], labels[validation]

    shared = [torch.full((65, 10), float(x)) for x in torch.linspace(*RANGE, trials)]
    drawn = [torch.empty(65, 10).uniform_(*RANGE) for _ in range(trials)]
    conjugate_gradient = bilevel.linear.ConjugateGradient(tolerance=1e-2)
    implicit = bilevel.estimators.Implicit(conjugate_gradient, warm_start=True)
    methods: dict[str, Callable[[], tuple[Tensor, list[float]]]] = {
        "one decay, grid": lambda: search(problem, held_out, shared),
        "650 decays, random search": lambda: search(problem, held_out, drawn),
        "650 decays, Implicit": lambda: tune(problem, held_out, implicit, trials),
        "650 decays, Adjoint": lambda: tune(
            problem, held_out, bilevel.estimators.Adjoint(), trials
        ),
    }
    print(f"{'method':<28}{'trials':>8}{'CPU seconds':>13}{'validation loss':>18}{'test loss':>12}")
    axes = (figure := Figure(layout="constrained")).subplots()
    for name, method in methods.items():
        began = time.process_time()
        best, losses = method()
        seconds = time.process_time() - began
        loss = problem.outer_loss(train(problem, best), {}, (images[test], labels[test]))
        print(f"{name:<28}{trials:>8}{seconds:>13.1f}{min(losses):>18.4f}{float(loss):>12.4f}")
        axes.plot(torch.tensor(losses).cummin(0).values, label=name)
    axes.set(xlabel="trial", ylabel="best validation loss so far", yscale="log")
    axes.legend()
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
