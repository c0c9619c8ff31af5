"""Few-shot learning: MAML and implicit MAML, for regression and for classification.

Outer variables: the initialisation of a small network. Regression: ten points of a sine of random
amplitude and phase. Classification: three kinds of digit, five images each, trained on tasks of the
digits 0 to 6 and judged on tasks of 7 to 9, which the outer loop never sees.

Estimators: MAML takes a few plain steps and needs the derivative through them: `Adjoint`. Implicit
MAML ties the parameters to the initialisation by a quadratic penalty and trains to the optimum,
where `Implicit` needs one linear solve for each task, however many steps led there. `Adjoint` goes
back through them all; `Reverse` also keeps the graph of each. Both are there for their cost alone.
"""

import argparse
import itertools
import time
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.estimators import Adjoint, Estimator, Implicit, Reverse

TASKS = 8
FIRST, LAST = range(7), range(7, 10)
DIGITS = [torch.tensor(array) for array in load_digits(return_X_y=True)]
Batch = tuple[Tensor, Tensor]
Outer = list[Tensor]


class FewShot(bilevel.Problem):
    """`TASKS` networks side by side from one initialisation: every tensor is [tasks, ...]."""

    def __init__(self, support: Batch, penalty: float) -> None:
        self.support, self.penalty = support, penalty

    def init(self, outer: Outer, *, generator: torch.Generator) -> Outer:
        return [leaf.expand(len(self.support[0]), *leaf.shape).clone() for leaf in outer]

    def inner_batch(self, outer: Outer, step: int, *, generator: torch.Generator) -> Outer:
        return outer if self.penalty else []

    def inner_loss(self, params: Outer, batch: Outer) -> Tensor:
        tie = [((leaf - centre) ** 2).sum() for leaf, centre in zip(params, batch, strict=False)]
        return loss(params, self.support) + 0.5 * self.penalty * sum(tie, torch.zeros(()))

    def outer_loss(self, params: Outer, outer: Outer, batch: Batch) -> Tensor:
        return loss(params, batch) / len(batch[0])


def loss(params: Outer, batch: Batch) -> Tensor:
    """The sum over tasks of the mean squared error, or of the cross-entropy for integers."""
    scores, targets = predict(params, batch[0]), batch[1]
    if targets.is_floating_point():
        return ((scores - targets) ** 2).mean((1, 2)).sum()
    return cross_entropy(scores.flatten(0, 1), targets.flatten()) * len(targets)


def predict(params: Outer, inputs: Tensor) -> Tensor:
    """A network with two hidden layers for each task: [tasks, points, outputs]."""
    *hidden, weight, bias = params
    for w, b in zip(hidden[::2], hidden[1::2], strict=True):
        inputs = torch.tanh(inputs @ w + b[:, None])
    return inputs @ weight + bias[:, None]


def sines(tasks: int) -> tuple[Batch, Batch]:
    """(support, query) of random sines: ten points to learn from, twenty to be judged on."""
    amplitude, phase = torch.rand(2, tasks, 1, 1) * torch.tensor([4.9, 3.14]).view(2, 1, 1, 1)
    x = torch.rand(tasks, 30, 1) * 10 - 5
    y = (amplitude + 0.1) * torch.sin(x + phase)
    return (x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:])


def digits(tasks: int, kinds: range = FIRST) -> tuple[Batch, Batch]:
    """(support, query) of three kinds of digit, five and ten images of each."""
    images, labels = DIGITS
    by_kind = [images[labels == kind].float() / 16 for kind in kinds]
    drawn = []
    for _ in range(tasks):
        chosen = [by_kind[int(kind)] for kind in torch.randperm(len(kinds))[:3]]
        drawn.append(torch.stack([pool[torch.randperm(len(pool))[:15]] for pool in chosen]))
    x, y = torch.stack(drawn), torch.arange(3)[:, None].expand(tasks, 3, 15)
    parts = slice(0, 5), slice(5, 15)
    return tuple((x[:, :, at].flatten(1, 2), y[:, :, at].flatten(1)) for at in parts)


def measure(run: bilevel.Trajectory, inner: bilevel.InnerLoop, query: Batch) -> float:
    """At the end of a run: the mean squared error, or the share of errors."""
    scores, targets = predict(inner.unravel(run.kept[run.horizon].params), query[0]), query[1]
    if targets.is_floating_point():
        return float(((scores - targets) ** 2).mean())
    return float((scores.argmax(-1) != targets).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer outer steps")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    options = parser.parse_args()
    rounds = 60 if options.quick else 250

    solver = bilevel.linear.ConjugateGradient(max_iterations=5, tolerance=0.5)
    methods: list[tuple[str, Estimator, int, float, int]] = [
        ("random initialisation", Adjoint(), 5, 0.0, 0),
        ("MAML, Adjoint", Adjoint(), 5, 0.0, rounds),
        ("MAML, Reverse", Reverse(), 5, 0.0, rounds // 20),
        ("implicit MAML, Implicit", Implicit(solver, damping=4, tasks=TASKS), 20, 0.5, rounds),
        ("implicit MAML, Adjoint", Adjoint(), 20, 0.5, rounds // 20),
    ]
    print(f"{'task and method':<38}{'outer steps':>12}{'CPU s/step':>12}{'error':>8}")
    panels = (figure := Figure(figsize=(9, 4), layout="constrained")).subplots(1, 2)
    for axes, kind, sizes, rate, train, test in (
        (panels[0], "regression", (1, 40, 40, 1), 0.01, sines, sines),
        (panels[1], "classification", (64, 40, 40, 3), 0.1, digits, partial(digits, kinds=LAST)),
    ):
        shapes = [shape for a, b in itertools.pairwise(sizes) for shape in ((a, b), (b,))]
        for name, estimator, steps, penalty, count in methods:
            torch.manual_seed(0)
            outer = [torch.randn(s) * (s[0] ** -0.5 if len(s) == 2 else 0) for s in shapes]
            optimizer = torch.optim.Adam([leaf.requires_grad_() for leaf in outer], lr=3e-3)
            inner_optimizer = bilevel.optim.sgd(rate, momentum=0.9 if penalty else 0.0)
            began, losses = time.process_time(), []
            for _ in range(count):
                support, query = train(TASKS)
                optimizer.zero_grad()
                problem = FewShot(support, penalty)  # cheap to make: one for every batch of tasks
                call = bilevel.Hypergradient(problem, inner_optimizer, steps, estimator=estimator)
                losses.append(float(call.backward(outer, query).loss))
                optimizer.step()
            seconds = (time.process_time() - began) / max(1, count)
            torch.manual_seed(1)
            support, query = test(200)
            inner = bilevel.InnerLoop(FewShot(support, penalty), inner_optimizer)
            run = bilevel.record(inner, outer, bilevel.Key(0), steps=steps)
            error = measure(run, inner, query)
            print(f"{kind + ', ' + name:<38}{count:>12}{seconds:>12.4f}{error:>8.3f}")
            if count == rounds:
                axes.plot(torch.tensor(losses).unfold(0, 10, 10).mean(1), label=name)
        axes.set(xlabel="outer steps / 10", ylabel="outer loss", title=kind)
        axes.legend()
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
