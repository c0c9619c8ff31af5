"""A learned rate schedule: twenty learning rates and a momentum, for a network that trains fast.

A small network trains on digits for 20 mini-batch steps from a fresh initialisation. Outer
variables: the learning rate of every step, and the momentum. Outer loss: on held-out digits at the
end of the run. Judged on other digits, by networks and batches that the outer loop did not see.

Estimator: `Adjoint`, exact, at the price of a few inner runs whatever the number of rates.
`Forward` gives the same number for one tangent for each rate: 21 times the run.
`EvolutionStrategies` differentiates nothing and needs many runs to see a direction among 21: right
when the outer loss is an accuracy, or when the run is too long to differentiate.
"""

import argparse
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.estimators import Adjoint, Estimator, EvolutionStrategies, Forward

STEPS = 20
NETWORK = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
Outer = dict[str, Tensor]


class Schedule(bilevel.Problem):
    """Train a fresh network on random mini-batches, each step with a rate of its own."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def init(self, outer: Outer, *, generator: torch.Generator) -> dict[str, Tensor]:
        return bilevel.fresh_parameters(NETWORK, generator)

    def hyperparameters(self, outer: Outer, step: int) -> dict[str, Tensor]:
        return {"lr": outer["log_rate"][step].exp(), "momentum": outer["momentum"].sigmoid()}

    def inner_batch(
        self, outer: Outer, step: int, *, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        drawn = torch.randint(len(self.labels), (32,), generator=generator)
        return self.images[drawn], self.labels[drawn]

    def inner_loss(self, params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return cross_entropy(functional_call(NETWORK, params, (images,)), labels)

    def outer_loss(
        self, params: dict[str, Tensor], outer: Outer, batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch
        scores = functional_call(NETWORK, params, (images,))
        return cross_entropy(scores, labels), {"accuracy": (scores.argmax(1) == labels).float()}


def constant(log_rate: float) -> Outer:
    return {"log_rate": torch.full((STEPS,), log_rate), "momentum": torch.tensor(1.0)}


def judge(problem: Schedule, outer: Outer, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """(loss, accuracy) at the end of the run: mean over eight networks."""
    inner = bilevel.InnerLoop(problem, bilevel.optim.sgd)
    found = []
    for seed in range(8):
        run = bilevel.record(inner, outer, bilevel.Key(seed), steps=STEPS)
        loss, metrics = inner.outer_loss(run.kept[STEPS].params, outer, data)
        found.append((float(loss), float(metrics["accuracy"].mean())))
    losses, accuracies = zip(*found, strict=True)
    return sum(losses) / len(found), sum(accuracies) / len(found)


def learn(
    problem: Schedule,
    validation: tuple[Tensor, Tensor],
    estimator: Estimator,
    outer: Outer,
    rounds: int,
) -> Outer:
    """The schedule after `rounds` outer steps."""
    outer = {name: value.clone().requires_grad_() for name, value in outer.items()}
    outer_optimizer = torch.optim.Adam(outer.values(), lr=0.05)
    hypergradient = bilevel.Hypergradient(problem, bilevel.optim.sgd, STEPS, estimator=estimator)
    for _ in range(rounds):
        outer_optimizer.zero_grad()
        hypergradient.backward(outer, validation)
        outer_optimizer.step()
    return {name: value.detach() for name, value in outer.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer outer steps")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    options = parser.parse_args()
    rounds = 40 if options.quick else 150

    torch.manual_seed(0)
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    part = torch.randperm(len(images)).split([800, 400, len(images) - 1200])
    training, validation, test = ((images[index], labels[index]) for index in part)
    problem = Schedule(*training)

    print(f"{'schedule':<30}{'outer steps':>12}{'CPU s/step':>12}{'test loss':>11}{'accuracy':>10}")
    axes = (figure := Figure(layout="constrained")).subplots()

    def row(name: str, outer: Outer, steps: int, seconds: float) -> None:
        loss, accuracy = judge(problem, outer, test)
        print(
            f"{name:<30}{steps:>12}{seconds / max(1, steps):>12.3f}{loss:>11.3f}{accuracy:>10.3f}"
        )
        axes.plot(outer["log_rate"].exp(), label=name)

    began = time.process_time()
    grid = [constant(float(rate)) for rate in torch.linspace(-5, 0, 11)]
    best = min(grid, key=lambda outer: judge(problem, outer, validation)[0])
    row("best constant rate of 11", best, 0, time.process_time() - began)
    for name, estimator, steps in (
        ("learned, Adjoint", Adjoint(), rounds),
        ("learned, EvolutionStrategies", EvolutionStrategies(0.1, pairs=2), rounds),
        ("learned, Forward", Forward(), max(1, rounds // 40)),
    ):
        torch.manual_seed(1)
        began = time.process_time()
        outer = learn(problem, validation, estimator, best, steps)
        row(name, outer, steps, time.process_time() - began)
    axes.set(xlabel="inner step", ylabel="learning rate", yscale="log")
    axes.legend()
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
