"""Error against cost of every estimator, on the same problems.

Problems, all in float64
    ridge         Linear regression of 100 features with a penalty, condition number about 30,
                  gradient descent for 500 steps: converged. φ: the log of the penalty, 1 scalar.
    cleaning      Logistic regression on 200 examples of 20 features in 5 classes, full batches,
                  500 steps with momentum: converged. φ: one weight an example, 200 scalars.
    distillation  A network of 32 hidden units trained on 10 learned inputs for 40 steps of Adam:
                  far from converged. φ: the inputs, 160 scalars.

Columns
    setting       What is varied: steps of the window, iterations of the solver, rank, pairs,
                  directions, further steps (after the penalty).
    evaluations   Times the inner loss was evaluated within the estimator.
    products      Hessian-vector products within it. Those for a dense matrix, Nyström and the
                  low-rank solver are computed together by `vmap`, so they cost less time each.
    cpu seconds   Processor time of the estimator alone, on a run that is recorded already; median
                  over repeats, at most about a second of them.
    error         ‖g − g*‖/‖g*‖. For the converged problems g* is the gradient at the inner optimum
                  itself (Newton's method from the last iterate, then a dense solve); for
                  distillation it is the derivative of the outer loss at the end of the run, by
                  autograd through all of it. Persistent evolution strategies: the last of four
                  segments, and the cost of that one call. The damping is 0 for the converged
                  problems, 0.01 for distillation, and 0.1 for Nyström and the low-rank solver.

The second table has the error on `cleaning` at shorter runs, against the gradient at the optimum;
the third the peak memory of the estimator on a network of 512 hidden units, 512 inputs and 40
steps, in a process of its own (`common.peak_memory`), above that of the recorded run.

    python benchmarks/estimators.py --threads 1
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import FAITHFUL_MALLOC, machine, peak_memory, table, write_json
from plot import Series, draw
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

import bilevel
from bilevel import estimators as e
from bilevel import linear

COST = {
    "problem": "s",
    "method": "s",
    "setting": "d",
    "evaluations": "d",
    "products": "d",
    "cpu seconds": ".4f",
    "error": ".1e",
}
LENGTH = {"steps": "d", "method": "s", "error": ".1e"}
MEMORY = {"method": "s", "MB": ".1f"}


@dataclass
class Case:
    """A problem with what it is solved with, and the outer variables it is judged at."""

    problem: bilevel.Problem
    optimizer: Any
    steps: int
    outer: Any
    outer_batch: Any
    converged: bool

    def run(self, steps: int | None = None) -> bilevel.Trajectory:
        """A recorded inner run."""
        steps = self.steps if steps is None else steps
        inner = bilevel.InnerLoop(self.problem, self.optimizer)
        return bilevel.record(inner, self.outer, bilevel.Key(0), steps=steps)


class Ridge(bilevel.Problem):
    """Linear regression with a learned penalty."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def init(self, outer: Any, *, generator: torch.Generator) -> Tensor:
        return torch.zeros(self.inputs.shape[1], dtype=torch.float64)

    def inner_batch(self, outer: Any, step: int, *, generator: torch.Generator) -> Tensor:
        return outer.exp()

    def inner_loss(self, params: Tensor, batch: Tensor) -> Tensor:
        residual = self.inputs @ params - self.targets
        return 0.5 * (residual**2).mean() + 0.5 * batch * (params**2).sum()

    def outer_loss(self, params: Tensor, outer: Any, batch: Any) -> Tensor:
        inputs, targets = batch
        return 0.5 * ((inputs @ params - targets) ** 2).mean()


class Cleaning(bilevel.Problem):
    """Logistic regression with a learned weight for every example."""

    def __init__(self, inputs: Tensor, labels: Tensor, classes: int) -> None:
        self.inputs, self.labels, self.classes = inputs, labels, classes

    def init(self, outer: Any, *, generator: torch.Generator) -> Tensor:
        return torch.zeros(self.inputs.shape[1], self.classes, dtype=torch.float64)

    def inner_batch(self, outer: Any, step: int, *, generator: torch.Generator) -> Tensor:
        return torch.sigmoid(outer)

    def inner_loss(self, params: Tensor, batch: Tensor) -> Tensor:
        losses = F.cross_entropy(self.inputs @ params, self.labels, reduction="none")
        return (batch * losses).mean() + 0.005 * (params**2).sum()

    def outer_loss(self, params: Tensor, outer: Any, batch: Any) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(inputs @ params, labels)


class Distillation(bilevel.Problem):
    """A small network trained on learned inputs."""

    def __init__(self, width: int, labels: Tensor) -> None:
        self.network = nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, 5)).double()
        self.labels = labels

    def init(self, outer: Any, *, generator: torch.Generator) -> dict[str, Tensor]:
        return bilevel.fresh_parameters(self.network, generator)

    def inner_batch(self, outer: Any, step: int, *, generator: torch.Generator) -> Tensor:
        return outer

    def inner_loss(self, params: dict[str, Tensor], batch: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(self.network, params, (batch,)), self.labels)

    def outer_loss(self, params: dict[str, Tensor], outer: Any, batch: Any) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(functional_call(self.network, params, (inputs,)), labels)


def ridge(draw: torch.Generator) -> Case:
    def data(count: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(count, 100, generator=draw).double() * scales
        return inputs, inputs @ truth + torch.randn(count, generator=draw).double()

    scales = torch.logspace(0, -0.5, 100, dtype=torch.float64)
    truth = torch.randn(100, generator=draw).double()
    problem, batch = Ridge(*data(150)), data(100)
    outer = torch.tensor(0.1, dtype=torch.float64).log()
    return Case(problem, bilevel.optim.sgd(0.4), 500, outer, batch, True)


def cleaning(draw: torch.Generator) -> Case:
    def data(count: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(count, 20, generator=draw).double()
        return inputs, (inputs @ truth + torch.randn(count, 5, generator=draw)).argmax(1)

    truth = torch.randn(20, 5, generator=draw).double()
    problem, batch = Cleaning(*data(200), classes=5), data(100)
    outer = torch.randn(200, generator=draw).double()
    return Case(problem, bilevel.optim.sgd(1.0, momentum=0.9), 500, outer, batch, True)


def distillation(draw: torch.Generator, width: int = 32, count: int = 10) -> Case:
    outer = torch.randn(count, 16, generator=draw).double()
    batch = torch.randn(100, 16, generator=draw).double(), torch.arange(100) % 5
    problem = Distillation(width, torch.arange(count) % 5)
    return Case(problem, bilevel.optim.adam(1e-2, eps_root=1e-8), 40, outer, batch, False)


PROBLEMS = {"ridge": ridge, "cleaning": cleaning, "distillation": distillation}


def make(name: str) -> Case:
    return PROBLEMS[name](torch.Generator().manual_seed(0))


def settings(name: str, case: Case) -> Iterator[tuple[str, int, e.Estimator, int]]:
    """(method, what is varied, estimator, width of the window)."""
    steps = case.steps
    damping = 0.0 if case.converged else 1e-2
    for window in [w for w in (1, 5, 20, 80, 200) if w < steps] + [steps]:
        yield "Adjoint", window, e.Adjoint(), window
    for window in (1, min(steps, 80)):
        yield "FiniteDifference", window, e.FiniteDifference(1e-3), window
    yield "FirstOrder", 1, e.FirstOrder(), 1
    if name == "ridge":
        yield "Forward", steps, e.Forward(), steps
    if not case.converged:
        for count in (1, 5, 25):
            yield "Forward, random", count, e.Forward(count), steps
    solvers = {
        "conjugate gradient": lambda k: linear.ConjugateGradient(k, 1e-12),
        "normal equations": lambda k: linear.NormalConjugateGradient(k, 1e-12),
        "GMRES": lambda k: linear.GMRES(k, 1e-12, restart=100),
        "Neumann": lambda k: linear.Neumann(0.4, k, 1e-12),
        "Nystrom": linear.Nystrom,
        "low rank": lambda k: linear.RandomizedEigendecomposition(k, 5, 1),
    }
    for method, solver in solvers.items():
        for count in (2, 5, 10, 20, 40, 80):
            low_rank = method in ("Nystrom", "low rank")
            rho = 0.1 if low_rank else damping
            yield f"Implicit, {method}", count, e.Implicit(solver(count), damping=rho), 1
    yield "Implicit, dense", 0, e.Implicit(linear.Dense(), damping=damping), 1
    if case.converged:
        for count in (5, 20, 80, 300):
            yield "FixedPoint, Neumann", count, e.FixedPoint(linear.Neumann(1.0, count, 1e-12)), 1
        for count in (20, 80, 300):
            yield "Penalty, 1e2", count, e.Penalty(1e2, count), 1
            yield "Penalty, 1e5", count, e.Penalty(1e5, count), 1
            yield "MoreauEnvelope, 1e5", count, e.MoreauEnvelope(1e5, 10.0, count), 1
            yield "ValueFunction", count, e.ValueFunction(1.0, count), 1
        for count in (5, 20, 80):
            solver = linear.GMRES(count, 1e-12, restart=100)
            yield "FixedPoint, GMRES", count, e.FixedPoint(solver), 1
    for pairs in (1, 4) if case.converged else (1, 5, 25):
        yield "Evolution strategies", pairs, e.EvolutionStrategies(0.01, pairs), steps
        estimator = e.PersistentEvolutionStrategies(0.01, steps, pairs)
        yield "Persistent evolution", pairs, estimator, steps // 4


def reference(case: Case) -> Tensor:
    """The gradient at the inner optimum, or through the whole run where there is none."""
    trajectory = case.run()
    inner = trajectory.inner
    if not case.converged:
        whole = trajectory.select(bilevel.Window(0, case.steps))
        return e.Reverse()(whole, case.outer_batch).grads
    end = trajectory.kept[case.steps]
    batch, params = inner.inputs(case.outer, 0, trajectory.key).batch, end.params
    for _ in range(5):
        hessian = linear.HessianOperator(lambda p: inner.gradient(p, batch), params)
        params = params - linear.Dense().solve(hessian, hessian.gradient).x
    kept = {**trajectory.kept, case.steps: bilevel.Iterate(params, end.state)}
    polished = replace(trajectory, kept=kept)
    return e.Implicit(linear.Dense())(polished, case.outer_batch).grads


def measure_cost(name: str, repeats: int, methods: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One row for each setting of each method whose name begins with one of `methods`."""
    case = make(name)
    trajectory = case.run()
    expected = reference(case)
    count = 0
    loss = case.problem.inner_loss

    def counted(params: Any, batch: Any) -> Tensor:
        nonlocal count
        count += 1
        return loss(params, batch)

    case.problem.inner_loss = counted  # type: ignore[method-assign]
    for method, setting, estimator, width in settings(name, case):
        if not method.startswith(tuple(methods)):
            continue
        window = trajectory.select(bilevel.Window(case.steps - width, case.steps))
        persistent = isinstance(estimator, e.PersistentEvolutionStrategies)
        seconds = []
        result = None
        try:
            for _ in range(4 if persistent else repeats):
                count, start = 0, time.process_time()
                result = estimator(window, case.outer_batch)
                seconds.append(time.process_time() - start)
                if not persistent and sum(seconds) > 1:
                    break
        except bilevel.SolverError:
            continue  # a diverging series has no error to plot
        assert result is not None
        yield {
            "problem": name,
            "method": method,
            "setting": setting,
            "evaluations": count,
            "products": result.stats.hessian_vector_products,
            "cpu seconds": statistics.median(seconds),
            "error": relative_error(result.grads, expected),
        }


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def measure_length() -> list[dict[str, Any]]:
    """Error at shorter runs, against the gradient at the optimum."""
    case = make("cleaning")
    expected = reference(case)
    methods = {
        "Adjoint, whole run": (e.Adjoint(), None),
        "Adjoint, last 10 steps": (e.Adjoint(), 10),
        "Implicit": (e.Implicit(linear.ConjugateGradient(300, 1e-10)), 1),
        "FixedPoint": (e.FixedPoint(linear.GMRES(300, 1e-10, restart=300)), 1),
    }
    rows = []
    for steps in (10, 30, 100, 200, 300, 400, 500):
        trajectory = case.run(steps)
        for method, (estimator, width) in methods.items():
            window = trajectory.select(bilevel.Window(steps - (width or steps), steps))
            grads = estimator(window, case.outer_batch).grads
            rows.append(
                {"steps": steps, "method": method, "error": relative_error(grads, expected)}
            )
    return rows


#: Methods of the memory table; the damping keeps the unconverged Hessian positive definite.
MEMORY_OF: dict[str, e.Estimator] = {
    "Reverse": e.Reverse(),
    "Adjoint": e.Adjoint(),
    "FiniteDifference": e.FiniteDifference(),
    "FirstOrder": e.FirstOrder(),
    "Penalty": e.Penalty(steps=20),
    "Implicit, conjugate gradient": e.Implicit(linear.ConjugateGradient(20), damping=1.0),
    "Implicit, GMRES": e.Implicit(linear.GMRES(20), damping=1.0),
    "Implicit, Nystrom": e.Implicit(linear.Nystrom(20), damping=1.0),
    "Evolution strategies": e.EvolutionStrategies(0.01, pairs=2),
}


def measure_memory(method: str) -> float:
    """Peak memory of one estimator in this process."""
    case = distillation(torch.Generator().manual_seed(0), width=512, count=512)
    trajectory = case.run()
    estimator = MEMORY_OF[method]
    warm = trajectory.select(bilevel.Window(case.steps - 1, case.steps))
    e.Reverse()(warm, case.outer_batch)
    return peak_memory(lambda: estimator(trajectory, case.outer_batch))


def memory_in_a_process(method: str, threads: int) -> float:
    """`measure_memory` in a fresh process with its own allocator settings."""
    process = subprocess.run(
        [sys.executable, __file__, f"--memory-of={method}", f"--threads={threads}"],
        env={**os.environ, **FAITHFUL_MALLOC},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(process.stdout)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Error against evaluations + products, one panel a problem."""
    panels = {}
    for name in dict.fromkeys(row["problem"] for row in rows):
        methods = dict.fromkeys(row["method"] for row in rows if row["problem"] == name)
        panels[name] = [
            Series(
                method,
                [
                    (row["evaluations"] + row["products"], max(row["error"], 1e-14))
                    for row in rows
                    if row["problem"] == name and row["method"] == method
                ],
            )
            for method in methods
        ]
    draw(panels, "evaluations + products", "relative error", path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument(
        "--methods", nargs="+", default=[""], help="those whose name begins so; default: all"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it here, as PNG")
    parser.add_argument("--memory-of", choices=MEMORY_OF, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.repeats, args.threads) < 1:
        parser.error("repeats and threads must be at least 1")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    # Solvers are stopped early on purpose, and forward mode scripts PyTorch's decompositions.
    warnings.simplefilter("ignore", bilevel.ConvergenceWarning)
    warnings.filterwarnings("ignore", message=".torch.jit.script")
    if args.memory_of is not None:
        print(measure_memory(args.memory_of))
        return
    cost = [
        row
        for name in args.problems
        for row in tqdm(measure_cost(name, args.repeats, args.methods), name, disable=None)
    ]
    length = measure_length() if args.methods == [""] else []
    memory = [
        {"method": method, "MB": memory_in_a_process(method, args.threads)}
        for method in MEMORY_OF
        if method.startswith(tuple(args.methods))
    ]
    print(" | ".join(f"{name}: {value}" for name, value in machine().items()))
    for rows, columns in ((cost, COST), (length, LENGTH), (memory, MEMORY)):
        print(table(rows, columns), end="\n\n")
    if args.json is not None:
        write_json(
            args.json,
            [
                *({"table": "cost", **row} for row in cost),
                *({"table": "length", **row} for row in length),
                *({"table": "memory", **row} for row in memory),
            ],
            {},
        )
    if args.plot is not None:
        plot(cost, args.plot)


if __name__ == "__main__":
    main()
