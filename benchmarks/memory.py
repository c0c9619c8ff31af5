"""Peak memory of one hypergradient against a model of it.

    peak = kept + max(one adjoint step, the outer loss)
    kept           = (⌈W / k⌉ + (k if k > 1 else 0)) · p · (1 + s) · bytes of a number
    one adjoint step = f · a · inner batch
    the outer loss   = g · a · micro-batch

p is the number of parameters, s the numbers that the optimizer stores for each (Adam: 2), W the
width of the window, k `keep_every`, and a the bytes of all layer outputs for one image. f and g do
not depend on the sizes: they are calibrated in two runs of a network of width 32, one whose adjoint
step dominates and one whose outer loss does, and then predict every other row. T is in it only
through W: a schedule that chooses its window after the run (`StageAware`) keeps W = T.

Every row is one process of its own, in which the allocator is set so that the resident set follows
the tensors alive (`common.FAITHFUL_MALLOC`); its peak is above that before the call, after a first
call with a window of one step. Eager mode, on the CPU.

    python benchmarks/memory.py --json benchmarks/results/memory_cpu.json

With --large another table: a ResNet18 of 11 million parameters, 10 images, and a window of 300
steps with `keep_every` at its default, beside autograd through windows of 1, 2 and 3 steps, from
which that through 300 is continued as a straight line. Some ten minutes.

    python benchmarks/memory.py --large --json benchmarks/results/memory_large_cpu.json
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import FAITHFUL_MALLOC, machine, peak_memory, table, write_json
from hypergradient import Distillation, adam
from tqdm import tqdm

import bilevel
from dd.networks import ResNet18

ADAM_STATE = 2
COLUMNS = {
    "estimator": "s",
    "width": "d",
    "images": "d",
    "real": "d",
    "window": "d",
    "keep_every": "d",
    "kept MB": ".1f",
    "predicted MB": ".0f",
    "MB": ".0f",
    "predicted / measured": ".2f",
}
#: (width, inner images, real images, window, keep_every; None for the default).
CALIBRATION = {"adjoint": (32, 100, 10, 2, 1), "outer": (32, 10, 400, 2, 1)}
CASES = [
    (64, 50, 256, 10, None),
    (64, 50, 256, 100, None),
    (64, 50, 256, 100, 1),
    (64, 50, 256, 100, 10),
    (64, 100, 64, 40, 1),
    (32, 50, 10, 40, 1),
    (128, 10, 128, 20, 1),
    (128, 50, 64, 100, 10),
]

LARGE_WINDOW = 300
AUTOGRAD_WINDOWS = (1, 2, 3)


def hypergradient(
    problem: Distillation,
    window: int,
    keep_every: int | None,
    estimator: bilevel.estimators.Estimator | None = None,
) -> Any:
    return bilevel.Hypergradient(
        problem,
        adam(),
        steps=1 + window,
        truncation=bilevel.truncation.Last(window),
        estimator=estimator,
        keep_every=keep_every,
    )(problem.images, problem.real, torch.Generator().manual_seed(1))


def problem_of(width: int, images: int, real: int) -> Distillation:
    problem = Distillation(width, images)
    problem.real = (problem.real[0].repeat(2, 1, 1, 1)[:real], problem.real[1].repeat(2)[:real])
    return problem


def large_problem() -> Distillation:
    problem = problem_of(1, 10, 10)
    problem.network = ResNet18(10)
    return problem


def measured(option: str, case: tuple[Any, ...], threads: int) -> float:
    """Peak memory of one case, in a process of its own."""
    process = subprocess.run(
        [sys.executable, __file__, f"--threads={threads}", option, *map(str, case)],
        env={**os.environ, **FAITHFUL_MALLOC},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(process.stdout)


def output_megabytes(width: int) -> float:
    """a: what all layers of the network put out for one image."""
    network = problem_of(width, 1, 1).network
    total = 0

    def count(module: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += output.nbytes

    for layer in network.modules():
        if not list(layer.children()):
            layer.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    return total / 1e6


def kept_megabytes(width: int, window: int, keep_every: int) -> float:
    size = sum(value.nbytes for value in problem_of(width, 1, 1).network.parameters()) / 1e6
    segment = keep_every if keep_every > 1 else 0
    return (math.ceil(window / keep_every) + segment) * size * (1 + ADAM_STATE)


def default_spacing(width: int, window: int) -> int:
    """What `keep_every=None` means for this network."""
    inner = bilevel.InnerLoop(problem_of(width, 1, 1), adam())
    start = inner.start(inner.problem.images, bilevel.Key(0), {})  # type: ignore[attr-defined]
    return bilevel.trajectory.affordable_spacing(start, window)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--large", action="store_true", help="the other table, see above")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--one-large", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one_large is not None:
        estimator = getattr(bilevel.estimators, args.one_large[0])()
        large = large_problem()
        hypergradient(large, 1, 1)
        window = int(args.one_large[1])
        print(peak_memory(lambda: hypergradient(large, window, None, estimator)))
        return
    if args.one is not None:
        width, images, real, window = map(int, args.one[:4])
        keep_every = None if args.one[4] == "None" else int(args.one[4])
        problem = problem_of(width, images, real)
        hypergradient(problem, 1, 1)
        print(peak_memory(lambda: hypergradient(problem, window, keep_every)))
        return
    rows, summary = large_table(args.threads) if args.large else model_table(args.threads)
    print(" | ".join(f"{name}: {value}" for name, value in machine().items()))
    print(table(rows, {name: COLUMNS[name] for name in rows[0]}))
    print(" | ".join(f"{name}: {value:.3f}" for name, value in summary.items()))
    if args.json is not None:
        write_json(args.json, rows, summary)


def large_table(threads: int) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
    """Rows of `Adjoint` and of autograd on a large network, and what 300 steps need."""
    cases = [("Adjoint", LARGE_WINDOW), *(("Reverse", window) for window in AUTOGRAD_WINDOWS)]
    rows = [
        {
            "estimator": name,
            "window": window,
            "MB": measured("--one-large", (name, window), threads),
        }
        for name, window in tqdm(cases, disable=None)
    ]
    growth = statistics.linear_regression(AUTOGRAD_WINDOWS, [row["MB"] for row in rows[1:]])
    autograd = growth.intercept + growth.slope * LARGE_WINDOW
    summary = {
        "parameters": float(sum(p.numel() for p in large_problem().network.parameters())),
        "adjoint_MB": rows[0]["MB"],
        "autograd_MB_continued": autograd,
        "adjoint_over_autograd": rows[0]["MB"] / autograd,
    }
    return rows, summary


def model_table(threads: int) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
    """Rows of what was predicted and measured, and the factors with which."""
    # Side by side, since nothing is timed.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cases = [*CALIBRATION.values(), *CASES]
        found = pool.map(lambda case: measured("--one", case, threads), cases)
        peaks = dict(zip(cases, tqdm(found, total=len(cases), disable=None), strict=True))
    factors = {}
    for name, case in CALIBRATION.items():
        width, images, real, window, keep_every = case
        above = peaks[case] - kept_megabytes(width, window, keep_every)
        factors[name] = above / (output_megabytes(width) * (images if name == "adjoint" else real))
    rows = []
    for case in CASES:
        width, images, real, window, keep_every = case
        spacing = default_spacing(width, window) if keep_every is None else keep_every
        kept = kept_megabytes(width, window, spacing)
        outputs = output_megabytes(width)
        step = max(factors["adjoint"] * outputs * images, factors["outer"] * outputs * real)
        peak = peaks[case]
        rows.append(
            {
                "width": width,
                "images": images,
                "real": real,
                "window": window,
                "keep_every": spacing,
                "kept MB": kept,
                "predicted MB": kept + step,
                "MB": peak,
                "predicted / measured": (kept + step) / peak,
            }
        )
    ratios = [row["predicted / measured"] for row in rows]
    summary = {
        "f_adjoint_step": factors["adjoint"],
        "g_outer_loss": factors["outer"],
        "least_predicted_over_measured": min(ratios),
        "most_predicted_over_measured": max(ratios),
        "window_100_over_window_10": rows[1]["MB"] / rows[0]["MB"],
    }
    return rows, summary


if __name__ == "__main__":
    main()
