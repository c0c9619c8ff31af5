"""Time, memory and error of one hypergradient, side by side with the package `higher`.

The problem is dataset distillation: 50 synthetic images of 32×32×3 in 10 classes train a ConvNet-3
of width 64 with Adam, and the cross-entropy on 256 "real" images is differentiated with respect to
the synthetic ones. All data are standard normal, from one seed. One call is: initialise, 60 inner
steps without a graph, a window of W differentiated steps, the outer loss, its gradient.

Methods
    higher           `higher.innerloop_ctx` with its own Adam, autograd through the whole window;
                     the steps before it by `torch.optim.Adam`, as the released RaT-BPTT does.
    reverse          `bilevel.estimators.Reverse`, the same computation in this package.
    adjoint          `bilevel.estimators.Adjoint()`, the default.
    compiled         The same, with `Hypergradient(compile=True)`. Compiling is not in its time.
    adjoint-forward  `bilevel.estimators.Adjoint(hvp="forward")`, when asked for by --methods.
    torchopt         `torchopt.MetaAdam` through the window, its graph cut after every step before
                     the window, when asked for by --methods.

Columns
    time/higher      Seconds of this method over those of `higher` at the same window.
    cpu/higher       The same for processor seconds.
    memory/higher    The same for MB.
    seconds          One whole call: the median over repeats, in which the methods take turns, so
                     that a slow moment of the machine hits all of them, each in a process of its
                     own: in the heap that `higher` leaves behind, others run a third slower. For
                     the window alone run with --burn-in 0.
    cpu seconds      Processor time of the same calls, of all threads: also the median. Where others
                     use the machine, this with --threads 1 is the one to trust.
    MB               Peak of the resident set during one call, above the resident set before it,
                     each in a process of its own, and with ten steps before the window at most,
                     since those steps keep nothing. "Before" is: everything imported, the data and
                     the network in memory, and one plain step taken by `torch.optim.Adam`, the
                     same for all methods (it makes PyTorch load what any of them needs, more than
                     100 MB of code). So all that a method adds counts: graphs, stored iterates,
                     scratch space, and the outer loss on the real images, which needs the same for
                     all. The compiler's own memory does not count: "before" is then after a first
                     call with a window of one step. The allocator is set so that the resident set
                     follows the tensors alive (`common.FAITHFUL_MALLOC`); it is left alone where
                     time is measured.
    error            ‖float32 − float64‖ / ‖float64‖ of the hypergradient, at the smallest window.
                     The float64 one is by `reverse`. All start the window from one and the same
                     (θ, Adam state), that of one float32 run, so the chaos of the steps before it
                     does not count. That of the window does, and differs tenfold from start to
                     start: this is a geometric mean over as many starts as repeats. `higher` adds
                     Adam's eps before the bias correction, and so differentiates a slightly
                     different step; its "error" includes that.

The summary is taken at the first width and number of images and the largest window, for `compiled`,
or for `adjoint` where that was not measured: how many times faster than `higher` (in seconds), what
part of its memory, and what part of its growth in memory from the smallest window to the largest.

--keep-freed-memory keeps glibc from handing freed blocks back to the system, for all methods alike,
as the commands of `dd` do for themselves.

    python benchmarks/hypergradient.py
    python benchmarks/hypergradient.py --quick
"""

import argparse
import contextlib
import copy
import functools
import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optree
import torch
import torch.nn.functional as F
import torchopt
from common import FAITHFUL_MALLOC, machine, peak_memory, table, write_json
from recordings import run_again
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

import bilevel
from dd.cli import keep_freed_memory
from dd.networks import ConvNet

LEARNING_RATE = 1e-3
CLASSES = 10
REAL_IMAGES = 256
#: `higher` has no eps_root, so nobody uses one. No second moment is zero after the first steps.
EPS_ROOT = 0.0

ESTIMATORS: dict[str, bilevel.estimators.Estimator] = {
    "reverse": bilevel.estimators.Reverse(),
    "adjoint": bilevel.estimators.Adjoint(),
    "compiled": bilevel.estimators.Adjoint(),
    "adjoint-forward": bilevel.estimators.Adjoint(hvp="forward"),
}
METHODS = ("higher", "torchopt", *ESTIMATORS)

COLUMNS = {
    "width": "d",
    "images": "d",
    "window": "d",
    "method": "s",
    "time/higher": ".2f",
    "cpu/higher": ".2f",
    "memory/higher": ".3f",
    "seconds": ".2f",
    "cpu seconds": ".2f",
    "MB": ".0f",
    "error": ".1e",
}


class Distillation(bilevel.Problem):
    """A network trained on learned images with fixed labels, judged on real ones."""

    def __init__(self, width: int, images: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(count: int) -> tuple[Tensor, Tensor]:
            inputs = torch.randn(count, 3, 32, 32, generator=generator).to(dtype)
            return inputs, torch.arange(count) % CLASSES

        self.network: nn.Module = ConvNet(CLASSES, depth=3, width=width).to(dtype)
        self.images, self.labels = draw(images)
        self.real = draw(REAL_IMAGES)

    def to(self, device: torch.device) -> "Distillation":
        """The same problem with its network and data on `device`."""
        self.network.to(device)
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        self.real = (self.real[0].to(device), self.real[1].to(device))
        return self

    def init(self, outer: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
        return bilevel.fresh_parameters(self.network, generator)

    def inner_batch(self, outer: Tensor, step: int, *, generator: torch.Generator) -> Tensor:
        return outer

    def inner_loss(self, params: dict[str, Tensor], batch: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(self.network, params, (batch,)), self.labels)

    def outer_loss(self, params: dict[str, Tensor], outer: Tensor, batch: Any) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(functional_call(self.network, params, (inputs,)), labels)


def adam() -> Any:
    return bilevel.optim.adam(LEARNING_RATE, eps_root=EPS_ROOT)


def hypergradient(method: str, problem: Distillation, burn_in: int, window: int) -> Tensor:
    """One whole call: initialise, `burn_in` steps without a graph, the window, the gradient."""
    generator = torch.Generator().manual_seed(1)
    if method == "higher":
        problem.network.load_state_dict(bilevel.fresh_parameters(problem.network, generator))
        return higher_window(problem, plain_steps(problem, burn_in), window)
    if method == "torchopt":
        problem.network.load_state_dict(bilevel.fresh_parameters(problem.network, generator))
        return torchopt_window(problem, burn_in, window)
    made = ours(method, problem, burn_in, window)
    return made(problem.images, problem.real, generator).grads


@functools.cache
def ours(method: str, problem: Distillation, burn_in: int, window: int) -> bilevel.Hypergradient:
    """Made once, so that what it compiled is reused."""
    return bilevel.Hypergradient(
        problem,
        adam(),
        steps=burn_in + window,
        truncation=bilevel.truncation.Last(window),
        estimator=ESTIMATORS[method],
        compile=method == "compiled",
    )


def plain_steps(problem: Distillation, count: int) -> torch.optim.Optimizer:
    """Train the network as anyone does, and return its optimizer."""
    optimizer = torch.optim.Adam(problem.network.parameters(), lr=LEARNING_RATE)
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(problem.network(problem.images), problem.labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def higher_window(problem: Distillation, optimizer: torch.optim.Optimizer, window: int) -> Tensor:
    """The hypergradient by `higher` from where the network and its optimizer stand."""
    import higher  # an extra, which the other methods do without

    images = problem.images.clone().requires_grad_()
    inputs, labels = problem.real
    with higher.innerloop_ctx(problem.network, optimizer, copy_initial_weights=True) as (fast, opt):
        for _ in range(window):
            opt.step(F.cross_entropy(fast(images), problem.labels))
        loss = F.cross_entropy(fast(inputs), labels)
    return torch.autograd.grad(loss, images)[0]


def torchopt_window(problem: Distillation, burn_in: int, window: int) -> Tensor:
    """The hypergradient by TorchOpt's differentiable Adam, from the network's parameters."""
    network = copy.deepcopy(problem.network)
    optimizer = torchopt.MetaAdam(network, lr=LEARNING_RATE)
    for _ in range(burn_in):
        optimizer.step(F.cross_entropy(network(problem.images), problem.labels))
        torchopt.stop_gradient(network)
        torchopt.stop_gradient(optimizer)
    images = problem.images.clone().requires_grad_()
    for _ in range(window):
        optimizer.step(F.cross_entropy(network(images), problem.labels))
    inputs, labels = problem.real
    return torch.autograd.grad(F.cross_entropy(network(inputs), labels), images)[0]


def errors(
    methods: Sequence[str], width: int, images: int, burn_in: int, window: int, starts: int
) -> dict[str, float]:
    """Geometric means over starts of every method's relative error."""
    found = [
        errors_from(bilevel.Key(seed), methods, width, images, burn_in, window)
        for seed in range(1, 1 + starts)
    ]
    return {name: statistics.geometric_mean(each[name] for each in found) for name in found[0]}


def errors_from(
    key: bilevel.Key, methods: Sequence[str], width: int, images: int, burn_in: int, window: int
) -> dict[str, float]:
    """Relative error of every method's float32 hypergradient from one common start."""
    problem = problem_of(width, images)
    inner = bilevel.InnerLoop(problem, adam())
    horizon = burn_in + window
    trajectory = bilevel.record(inner, problem.images, key, steps=horizon, keep_from=burn_in)
    exact_problem = Distillation(width, images, torch.float64)
    exact_inner = bilevel.InnerLoop(exact_problem, adam())
    exact_trajectory = run_again(
        exact_inner, exact_problem.images, trajectory, _double(trajectory.kept[burn_in])
    )
    exact = bilevel.estimators.Reverse()(exact_trajectory, exact_problem.real).grads
    found = {}
    for name, estimator in ESTIMATORS.items():
        if name not in methods:
            continue
        recorded = trajectory
        if name == "compiled":
            # Its steps are compiled already, since this is the process that it was timed in.
            compiled = ours("compiled", problem, burn_in, window).inner
            recorded = run_again(compiled, problem.images, trajectory, trajectory.kept[burn_in])
        found[name] = estimator(recorded, problem.real).grads
    optimizer = _resume(problem.network, inner, trajectory.kept[burn_in])
    found["higher"] = higher_window(problem, optimizer, window)
    return {name: float((grad - exact).norm() / exact.norm()) for name, grad in found.items()}


def _double(iterate: bilevel.Iterate) -> bilevel.Iterate:
    state = optree.tree_map(lambda x: x.double() if x.is_floating_point() else x, iterate.state)
    return bilevel.Iterate(iterate.params.double(), state)


def _resume(
    network: nn.Module, inner: bilevel.InnerLoop, iterate: bilevel.Iterate
) -> torch.optim.Optimizer:
    """Put `network` at an iterate of `bilevel`, and return its Adam at the same point."""
    network.load_state_dict(inner.unravel(iterate.params))
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    means, squares = inner.unravel(iterate.state.mean), inner.unravel(iterate.state.square)
    for name, parameter in network.named_parameters():
        optimizer.state[parameter] = {
            "step": int(iterate.state.step),
            "exp_avg": means[name],
            "exp_avg_sq": squares[name],
        }
    return optimizer


def measure_memory(method: str, width: int, images: int, burn_in: int, window: int) -> float:
    """Peak memory of one call in this process; see the text at the top for what it is above."""
    problem = Distillation(width, images)
    plain_steps(problem, 1)
    if method == "compiled":
        hypergradient(method, problem, burn_in, window=1)
    return peak_memory(lambda: hypergradient(method, problem, burn_in, window))


def memory_in_a_process(
    method: str, width: int, images: int, window: int, args: argparse.Namespace
) -> float:
    """`measure_memory` in a fresh process with its own allocator settings."""
    options = {
        "memory-of": method,
        "windows": window,
        "width": width,
        "images": images,
        "burn-in": min(args.burn_in, 10),
        "threads": args.threads,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    process = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, **FAITHFUL_MALLOC},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(process.stdout)


def worker(args: argparse.Namespace) -> ProcessPoolExecutor:
    """A process of its own, in which one method is timed."""
    return ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(args.threads, args.keep_freed_memory),
    )


def start_worker(threads: int, keep: bool) -> None:
    torch.set_num_threads(threads)
    if keep:
        keep_freed_memory()


def timed(method: str, width: int, images: int, burn_in: int, window: int) -> tuple[float, float]:
    """(seconds, processor seconds) of one call in this process."""
    problem = problem_of(width, images)
    start, processor_start = time.perf_counter(), time.process_time()
    hypergradient(method, problem, burn_in, window)
    return time.perf_counter() - start, time.process_time() - processor_start


@functools.cache
def problem_of(width: int, images: int) -> Distillation:
    return Distillation(width, images)


def measure(width: int, images: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each window and method, at one size."""
    cases = [(window, method) for window in args.windows for method in args.methods]
    warm_ups = sum(len(args.windows) if name == "compiled" else 1 for name in args.methods)
    total = (1 + args.repeats) * len(cases) + warm_ups + 1
    progress = tqdm(total=total, disable=None)

    def done(what: str) -> None:
        progress.set_description(f"width {width}, {images} images: {what}")
        progress.update()

    memory = {}
    # Side by side, since nothing is timed here.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(
            lambda case: memory_in_a_process(case[1], width, images, case[0], args), cases
        )
        for case, megabytes in zip(cases, found, strict=True):
            memory[case] = megabytes
            done("memory")

    wall: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    processor: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    with contextlib.ExitStack() as stack:
        workers = {method: stack.enter_context(worker(args)) for method in args.methods}
        warming_up = []
        for method in args.methods:
            for window in args.windows if method == "compiled" else (2,):
                burn_in = args.burn_in if method == "compiled" else 1
                warming_up.append(
                    workers[method].submit(timed, method, width, images, burn_in, window)
                )
        for running in warming_up:
            running.result()
            done("warm-up")
        for _ in range(args.repeats):
            for window, method in cases:
                seconds, cpu_seconds = (
                    workers[method]
                    .submit(timed, method, width, images, args.burn_in, window)
                    .result()
                )
                wall[window, method].append(seconds)
                processor[window, method].append(cpu_seconds)
                done("time")
        judge = workers["compiled" if "compiled" in args.methods else "adjoint"]
        asked = args.methods, width, images, args.burn_in, args.windows[0], args.repeats
        error = judge.submit(errors, *asked).result()
        done("error")
    progress.close()

    wall_median = {case: statistics.median(taken) for case, taken in wall.items()}
    cpu_median = {case: statistics.median(taken) for case, taken in processor.items()}
    return [
        {
            "width": width,
            "images": images,
            "window": window,
            "method": method,
            "time/higher": wall_median[window, method] / wall_median[window, "higher"],
            "cpu/higher": cpu_median[window, method] / cpu_median[window, "higher"],
            "memory/higher": memory[window, method] / memory[window, "higher"],
            "seconds": wall_median[window, method],
            "cpu seconds": cpu_median[window, method],
            "MB": memory[window, method],
            "error": error.get(method) if window == args.windows[0] else None,
        }
        for window, method in cases
    ]


def summarise(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Ours against `higher` at the first size; growth is None for a single window."""
    size = rows[0]["width"], rows[0]["images"]
    rows = [row for row in rows if (row["width"], row["images"]) == size]
    by_case = {(row["window"], row["method"]): row for row in rows}
    ours = "compiled" if "compiled" in {row["method"] for row in rows} else "adjoint"
    first, last = rows[0]["window"], rows[-1]["window"]

    def growth(method: str) -> float:
        return by_case[last, method]["MB"] - by_case[first, method]["MB"]

    return {
        "speedup_vs_higher": 1 / by_case[last, ours]["time/higher"],
        "memory_vs_higher": by_case[last, ours]["memory/higher"],
        "growth_vs_higher": growth(ours) / growth("higher") if last > first else None,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, nargs="+", default=[10, 20, 40])
    parser.add_argument("--burn-in", type=int, default=60, help="steps before the window")
    parser.add_argument(
        "--width", type=int, nargs="+", default=[64], help="channels of the ConvNet"
    )
    parser.add_argument("--images", type=int, nargs="+", default=[50], help="synthetic images")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        help="higher and adjoint are always among them (default: with reverse and compiled)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="under a minute: window 10, width 32, burn-in 10, 1 repeat, and by default higher and "
        "adjoint; --methods compiled adds about two minutes of compiling",
    )
    parser.add_argument("--keep-freed-memory", action="store_true", help="see above")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(*args.windows, *args.width, *args.images, args.repeats, args.threads) < 1:
        parser.error("windows, width, images, repeats and threads must be at least 1")
    if args.quick:
        args.windows, args.width, args.burn_in, args.repeats = [10], [32], 10, 1
    if args.methods is None:
        args.methods = [] if args.quick else ["reverse", "compiled"]
    args.windows = sorted(set(args.windows))
    args.methods = [m for m in METHODS if m in {"higher", "adjoint", *args.methods}]
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.memory_of is not None:
        window = args.windows[0]
        width, images = args.width[0], args.images[0]
        print(measure_memory(args.memory_of, width, images, args.burn_in, window))
        return
    sizes = itertools.product(args.width, args.images)
    rows = [row for width, images in sizes for row in measure(width, images, args)]
    summary = summarise(rows)
    print(" | ".join(f"{name}: {value}" for name, value in machine().items()))
    print(table(rows, COLUMNS))
    print(
        " | ".join(f"{name}: {value:.3f}" for name, value in summary.items() if value is not None)
    )
    if args.json is not None:
        write_json(args.json, rows, summary)


if __name__ == "__main__":
    main()
