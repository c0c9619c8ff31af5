"""Stage-aware truncation for a recurrent network: learn ten sequences that train others.

The inner problem is a recurrent network that reads digits row by row, trained from a fresh start on
ten learned sequences, one a class; eight networks at a time, against the noise of a start. Outer
variables: the sequences. Outer loss: on real ones.

Which steps of the run are differentiated is the schedule's choice. `StageAware` (AT-BPTT) follows
the recorded gradient norms; the recording is the run itself, so it costs no second network. `Full`
is exact for the loss and five times wider than the others. `RandomWindow` ignores the norms, and
`Last` sees only the end.

Estimator: `Adjoint`, exact for the window; its memory is one step's graph, as wide as the window
may be. `Reverse` gives the same number and keeps the graph of every step in the window.
"""

import argparse
import time
import weakref
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import bilevel
from bilevel.estimators import Adjoint, Reverse
from bilevel.truncation import ByFraction, Full, Last, RandomWindow, StageAware

STEPS, WINDOW, HIDDEN, NETWORKS = 40, 8, 32, 8
OPTIMIZER = bilevel.optim.adam(1e-2)
Batch = tuple[Tensor, Tensor]


class Sequences(bilevel.Problem):
    """Train a recurrent network on the learned sequences [10, 8, 8]; judge it on real ones."""

    def init(self, outer: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(NETWORKS, *shape, generator=generator) * shape[0] ** -0.5

        return {
            "input": normal(8, HIDDEN),
            "recurrent": normal(HIDDEN, HIDDEN),
            "bias": torch.zeros(NETWORKS, 1, HIDDEN),
            "output": normal(HIDDEN, 10),
        }

    def inner_batch(self, outer: Tensor, step: int, *, generator: torch.Generator) -> Batch:
        return outer, torch.arange(10)

    def inner_loss(self, params: dict[str, Tensor], batch: Batch) -> Tensor:
        return NETWORKS * loss(params, batch)  # the sum, so that each is trained as if alone

    def outer_loss(self, params: dict[str, Tensor], outer: Tensor, batch: Batch) -> Tensor:
        return loss(params, batch)


def loss(params: dict[str, Tensor], batch: Batch) -> Tensor:
    return cross_entropy(scores(params, batch[0]).flatten(0, 1), batch[1].repeat(NETWORKS))


def scores(params: dict[str, Tensor], sequences: Tensor) -> Tensor:
    """Of the classes, [networks, n, 10], after reading sequences [n, time, 8]."""
    state = torch.zeros(NETWORKS, len(sequences), HIDDEN)
    for row in sequences.unbind(1):
        state = torch.tanh(row @ params["input"] + state @ params["recurrent"] + params["bias"])
    return state @ params["output"]


def accuracy(sequences: Tensor, test: Batch) -> float:
    """Mean test accuracy of fresh networks trained on the sequences."""
    inner = bilevel.InnerLoop(Sequences(), OPTIMIZER)
    run = bilevel.record(inner, sequences, bilevel.Key(0), steps=STEPS)
    guess = scores(inner.unravel(run.kept[STEPS].params), test[0]).argmax(2)
    return float((guess == test[1]).float().mean())


class PeakMemory(TorchDispatchMode):
    """The most megabytes that tensors made under it held at any one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and not tensor._is_view():
                size = tensor.nbytes / 1e6
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor, self._free, size)
        return result

    def _free(self, size: float) -> None:
        self.now -= size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer outer steps")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    options = parser.parse_args()
    rounds = 30 if options.quick else 100

    torch.manual_seed(0)
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    part = torch.randperm(len(images)).split([1000, len(images) - 1000])
    real, test = ((images[index].float().view(-1, 8, 8) / 16, labels[index]) for index in part)
    start = torch.stack([real[0][(real[1] == kind).nonzero()[0, 0]] for kind in range(10)])

    columns = f"{'outer steps':>12}{'CPU s/step':>12}{'peak MB':>10}{'accuracy':>10}"
    print(f"{'schedule and estimator':<28}{columns}")
    print(f"{'real sequences':<28}{0:>12}{0:>12.3f}{0:>10.2f}{accuracy(start, test):>10.3f}")
    axes = (figure := Figure(layout="constrained")).subplots()
    stage_aware = StageAware(WINDOW, 3, ByFraction())
    for name, truncation, estimator, count in (
        ("StageAware, Adjoint", stage_aware, Adjoint(), rounds),
        ("RandomWindow, Adjoint", RandomWindow(WINDOW), Adjoint(), rounds),
        ("Last, Adjoint", Last(WINDOW), Adjoint(), rounds),
        ("Full, Adjoint", Full(), Adjoint(), rounds // 5),
        ("Full, Reverse", Full(), Reverse(), max(1, rounds // 20)),
    ):
        torch.manual_seed(1)
        sequences = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([sequences], lr=0.03)
        hypergradient = bilevel.Hypergradient(Sequences(), OPTIMIZER, STEPS, truncation, estimator)
        began, windows = time.process_time(), []
        for number in range(count):
            drawn = torch.randint(len(real[1]), (200,))
            optimizer.zero_grad()
            result = hypergradient.backward(sequences, (real[0][drawn], real[1][drawn]))
            optimizer.step()
            truncation.update({"progress": (number + 1) / count})
            windows.append((result.window.start + result.window.stop) / 2)
        seconds, reached = (time.process_time() - began) / count, accuracy(sequences.detach(), test)
        with PeakMemory() as memory:
            hypergradient(sequences, (real[0][:200], real[1][:200]))
        print(f"{name:<28}{count:>12}{seconds:>12.3f}{memory.peak:>10.2f}{reached:>10.3f}")
        axes.plot(windows, ".", label=name)
    axes.set(xlabel="outer step", ylabel="middle of the differentiated window", ylim=(0, STEPS))
    axes.legend()
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
