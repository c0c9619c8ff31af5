"""Data cleaning: a weight for each training example, of which 40 % have a wrong label.

Outer variables: one logit for each of 1000 examples; its sigmoid weighs the example's loss in a
short training run of a small network. They are tuned on 100 clean examples, and judged by networks
trained afresh on the weighted set, on the remaining digits.

Estimator: `Adjoint`, exact for a run as it is. This one is stopped long before an optimum, where
`Implicit` answers another question (its status says so). `FiniteDifference` over the last step
alone (as DARTS and SAMA) asks for two more gradients and no second derivative.
"""

import argparse
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.estimators import Adjoint, Estimator, FiniteDifference, Implicit
from bilevel.truncation import Full, Last, Truncation

STEPS = 40
OPTIMIZER = bilevel.optim.sgd(lr=0.3, momentum=0.9)
NETWORK = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


class Cleaning(bilevel.Problem):
    """Train a fresh network on weighted examples; judge it on clean ones."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def init(self, outer: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
        return bilevel.fresh_parameters(NETWORK, generator)

    def inner_batch(self, outer: Tensor, step: int, *, generator: torch.Generator) -> Tensor:
        return outer.sigmoid()

    def inner_loss(self, params: dict[str, Tensor], batch: Tensor) -> Tensor:
        scores = functional_call(NETWORK, params, (self.images,))
        return (batch * cross_entropy(scores, self.labels, reduction="none")).sum() / batch.sum()

    def outer_loss(
        self, params: dict[str, Tensor], outer: Tensor, batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch
        scores = functional_call(NETWORK, params, (images,))
        return cross_entropy(scores, labels), {
            "accuracy": (scores.argmax(1) == labels).double().mean()
        }


def accuracy(problem: Cleaning, logits: Tensor, test: tuple[Tensor, Tensor]) -> float:
    """Mean test accuracy of three fresh networks trained on the weighted examples."""
    inner = bilevel.InnerLoop(problem, OPTIMIZER)
    found = []
    for seed in range(3):
        run = bilevel.record(inner, logits, bilevel.Key(seed), steps=STEPS)
        found.append(inner.outer_loss(run.kept[STEPS].params, logits, test)[1]["accuracy"])
    return float(torch.stack(found).mean())


def clean(
    problem: Cleaning,
    validation: tuple[Tensor, Tensor],
    estimator: Estimator,
    truncation: Truncation,
    rounds: int,
) -> tuple[Tensor, int]:
    """(the learned logits, how many Hessian-vector products they took)."""
    logits = torch.zeros(len(problem.labels), requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    hypergradient = bilevel.Hypergradient(problem, OPTIMIZER, STEPS, truncation, estimator)
    products = 0
    for _ in range(rounds):
        optimizer.zero_grad()
        products += hypergradient.backward(logits, validation).stats.hessian_vector_products
        optimizer.step()
    return logits.detach(), products


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer outer steps")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    options = parser.parse_args()
    rounds = 12 if options.quick else 30

    torch.manual_seed(0)
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    part = torch.randperm(len(images)).split([1000, 100, len(images) - 1100])
    training, validation, test = ((images[index], labels[index]) for index in part)
    wrong = torch.rand(1000) < 0.4
    noisy = torch.where(wrong, (training[1] + torch.randint(1, 10, (1000,))) % 10, training[1])
    problem = Cleaning(training[0], noisy)

    never = torch.tensor(-30.0)
    columns = f"{'CPU seconds':>13}{'products':>10}{'found':>8}{'test accuracy':>15}"
    print(f"{'training set':<34}{columns}")

    def row(
        name: str, accuracy: float, seconds: float = 0, products: int = 0, found: float = 0.5
    ) -> None:
        print(f"{name:<34}{seconds:>13.1f}{products:>10}{found:>8.3f}{accuracy:>15.3f}")

    row("all examples alike", accuracy(problem, torch.zeros(1000), test))
    row("the 100 clean ones alone", accuracy(Cleaning(*validation), torch.zeros(100), test))
    oracle = torch.where(wrong, never, -never)
    row("right labels alone (not known)", accuracy(problem, oracle, test), found=1)
    axes = (figure := Figure(layout="constrained")).subplots()
    for name, estimator, truncation in (
        ("weighted, Adjoint", Adjoint(), Full()),
        ("weighted, Adjoint, last 10", Adjoint(), Last(10)),
        (
            "weighted, Implicit",
            Implicit(bilevel.linear.ConjugateGradient(20, tolerance=0.1), damping=0.1),
            Full(),
        ),
        ("weighted, FiniteDifference, last", FiniteDifference(), Last(1)),
    ):
        torch.manual_seed(1)
        began = time.process_time()
        logits, products = clean(problem, validation, estimator, truncation, rounds)
        seconds = time.process_time() - began
        found = float(roc_auc_score(~wrong, logits))
        row(name, accuracy(problem, logits, test), seconds, products, found)
        values = logits.sigmoid().sort().values
        axes.plot(values, label=name)
    axes.set(xlabel="training example, in order of weight", ylabel="weight")
    axes.axvline(float(wrong.sum()), color="grey", linestyle=":", label="number of wrong labels")
    axes.legend()
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
