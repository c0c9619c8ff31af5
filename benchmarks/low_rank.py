"""What a low-rank Hessian costs and what it loses, against the exact recursion on the same windows.

A ConvNet-3 is trained by its inner optimizer on 1 or 10 images per class, real ones to begin with.
One run is recorded, and windows of it that end early and late are differentiated with respect to
the images, the loss on real images being the outer one. All estimators get the same recording, the
same window and the same real images.

Columns
    ipc, optimizer, stop   Images per class; the inner optimizer; the step at which the window ends.
    cosine                 With the hypergradient of `Adjoint`: mean over seeds.
    least                  The least cosine over seeds.
    norm ratio             Norm over that of `Adjoint`: geometric mean over seeds.
    evaluations            Passes backward through the graph of an inner gradient: mean over seeds.
    cpu seconds            Processor seconds of the estimator, outer gradient included: median.
    /Adjoint               These over those of `Adjoint`.
    staleness, rank        As reported: median over seeds.
    exact                  How many seeds the guard sent to the exact recursion.

    python benchmarks/low_rank.py --data FOLDER --json benchmarks/results/low_rank_cpu.json

FOLDER holds `cifar-10-batches-py`; without it the images are standard normal.
"""

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import machine, table, write_json
from torch import Tensor, nn
from torch.func import functional_call

import bilevel
from bilevel.basis import Eigenvectors, Krylov
from bilevel.estimators import Adjoint, Estimator, LowRank
from dd.cli import keep_freed_memory
from dd.data import Standardize, cifar10
from dd.networks import ConvNet

CLASSES = 10
OPTIMIZERS = {
    "sgd": lambda: bilevel.optim.sgd(0.02, momentum=0.9),
    "adam": lambda: bilevel.optim.adam(1e-3, eps_root=1e-10),
}
METHODS: dict[str, Estimator] = {
    "Adjoint": Adjoint(),
    "LowRank": LowRank(),
    "Krylov": LowRank(guard=None),
    "Krylov, every mixed term": LowRank(Krylov(), group_size=1, guard=None),
    "Eigenvectors(8, 4, 1)": LowRank(Eigenvectors(8, 4, 1), group_size=1, guard=None),
}
COLUMNS = {
    "ipc": "d",
    "optimizer": "s",
    "stop": "d",
    "method": "s",
    "cosine": ".3f",
    "least": ".3f",
    "norm ratio": ".2f",
    "evaluations": ".1f",
    "cpu seconds": ".2f",
    "/Adjoint": ".2f",
    "staleness": ".2f",
    "rank": ".0f",
    "exact": "d",
}


class Distillation(bilevel.Problem):
    """A network trained on learned images with fixed labels, judged on real ones."""

    def __init__(self, network: nn.Module, labels: Tensor) -> None:
        self.network, self.labels = network, labels

    def init(self, outer: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
        return bilevel.fresh_parameters(self.network, generator)

    def inner_batch(self, outer: Tensor, step: int, *, generator: torch.Generator) -> Tensor:
        return outer

    def inner_loss(self, params: dict[str, Tensor], batch: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(self.network, params, (batch,)), self.labels)

    def outer_loss(self, params: dict[str, Tensor], outer: Tensor, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(functional_call(self.network, params, (images,)), labels)


def load(folder: str | None) -> tuple[Tensor, Tensor]:
    """(images, labels) to draw from."""
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(5000, 3, 32, 32, generator=generator), torch.arange(5000) % CLASSES
    data = cifar10(folder, download=False)
    images = data.train_images[:5000]
    return Standardize.fit(images)(images), data.train_labels[:5000]


def measure(
    images: Tensor, labels: Tensor, ipc: int, optimizer: str, seed: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row for each window and method, of one seed."""
    key = bilevel.Key(seed)
    order = torch.randperm(len(labels), generator=key.generator("images"))
    chosen = torch.cat([order[labels[order] == c][:ipc] for c in range(CLASSES)])
    real = order[~torch.isin(order, chosen)][: args.real_images]
    outer, batch = images[chosen], (images[real], labels[real])
    problem = Distillation(ConvNet(CLASSES, depth=3, width=args.width), labels[chosen])
    inner = bilevel.InnerLoop(problem, OPTIMIZERS[optimizer]())
    steps = max(args.stops)
    run = bilevel.record(inner, outer, key, steps=steps, keep_every=1, keep_gradients=True)
    rows = []
    for stop in args.stops:
        trajectory = run.select(bilevel.Window(stop - args.window, stop))
        exact = torch.zeros(0)
        for name, estimator in METHODS.items():
            began = time.thread_time()
            result = estimator(trajectory, batch)
            seconds = time.thread_time() - began
            grads = result.grads.flatten()
            exact = grads if name == "Adjoint" else exact
            low_rank = result.stats.low_rank
            rows.append(
                {
                    "ipc": ipc,
                    "optimizer": optimizer,
                    "stop": stop,
                    "method": name,
                    "seed": seed,
                    "cosine": float(F.cosine_similarity(grads, exact, dim=0)),
                    "norm ratio": float(grads.norm() / exact.norm()),
                    "evaluations": low_rank.evaluations if low_rank else args.window,
                    "cpu seconds": seconds,
                    "staleness": low_rank.staleness if low_rank else None,
                    "rank": low_rank.rank if low_rank and not low_rank.exact else None,
                    "exact": bool(low_rank and low_rank.exact),
                }
            )
    return rows


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row over all seeds."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(tuple(row[k] for k in ("ipc", "optimizer", "stop", "method")), []).append(
            row
        )
    found = []
    adjoint = 1.0
    for (ipc, optimizer, stop, method), cell in cells.items():
        seconds = statistics.median(row["cpu seconds"] for row in cell)
        adjoint = seconds if method == "Adjoint" else adjoint
        cosines = [row["cosine"] for row in cell]

        def middle(name: str, cell: list[dict[str, Any]] = cell) -> float | None:
            values = [row[name] for row in cell if row[name] is not None]
            return statistics.median(values) if values else None

        found.append(
            {
                "ipc": ipc,
                "optimizer": optimizer,
                "stop": stop,
                "method": method,
                "cosine": statistics.mean(cosines),
                "least": min(cosines),
                "norm ratio": math.exp(
                    statistics.mean(math.log(row["norm ratio"]) for row in cell)
                ),
                "evaluations": statistics.mean(row["evaluations"] for row in cell),
                "cpu seconds": seconds,
                "/Adjoint": seconds / adjoint,
                "staleness": middle("staleness"),
                "rank": middle("rank"),
                "exact": sum(row["exact"] for row in cell),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="FOLDER", help="holds cifar-10-batches-py")
    parser.add_argument("--ipc", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=16, help="of the network")
    parser.add_argument("--window", type=int, default=20)
    parser.add_argument("--stops", type=int, nargs="+", default=[20, 60])
    parser.add_argument("--real-images", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    images, labels = load(args.data)
    rows = []
    for ipc in args.ipc:
        for optimizer in OPTIMIZERS:
            for seed in range(args.seeds):
                rows += measure(images, labels, ipc, optimizer, seed, args)
    found = summarised(rows)
    print(" | ".join(f"{name}: {value}" for name, value in machine().items()))
    print(table(found, COLUMNS))
    if args.json is not None:
        write_json(args.json, found, {})


if __name__ == "__main__":
    main()
