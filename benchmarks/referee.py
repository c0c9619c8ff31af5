"""Whole bilevel problems, solved by every estimator that fits, by the clock and by evaluation.

Problems, after benchmark_bilevel, all in float32
    quadratic     100 parameters, condition 10; 20 outer scalars.
    logistic      Logistic regression on scikit-learn's breast cancer data, a penalty for each of 30
                  features.
    cleaning-p    A linear softmax on 1000 of scikit-learn's digits, of which a part p have a random
                  label; a weight for each.

Every method has the same outer gradient descent and the same inner run from θ_0 = 0, but "AmIGO"
and "SOBA" (`docs/estimators.md`), which go on from the last one. It is given so many processor
seconds at each of two outer rates, about the largest that is stable with the exact hypergradient
and 0.3 of it; before the clock starts it makes two calls, with which checks and caches are behind
it. Judging is outside the clock: the inner optimum of a φ by L-BFGS in float64, and the outer loss
there, F*(φ). The rate that got lowest is reported.

Columns
    steps         Outer steps within the time.
    F*            At the last φ.
    test          Test error there.
    s, 90%        Processor seconds until F* has made 90 % of the way from φ_0 to the best φ that
                  any method found; by bisection over the steps. A dash: it did not get there.
    evals, 90%    Evaluations of the inner loss until then, and Hessian-vector products, of which
                  unrolled methods take one for each step.
    s, evals, 99%  The same for 99 %.

    python benchmarks/referee.py --short
"""

import argparse
import copy
import math
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import machine, markdown, write_json
from inner_implicit import inner_optimum
from inner_problem import Params
from referee_methods import METHODS, available
from referee_problems import PROBLEMS, RefereeProblem
from tqdm import tqdm

import bilevel

#: Outer rates that are tried, in parts of the problem's own.
RATES = (1.0, 0.3)

#: Of the way to the best φ.
PARTS = (0.9, 0.99)


@dataclass
class Run:
    """One method at one outer rate: φ after every outer step, and what it had cost by then."""

    method: str
    rate: float
    positions: list[Params] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    remark: str = ""


class Judge:
    """F*(φ) = F(θ*(φ), φ) in float64."""

    def __init__(self, problem: RefereeProblem) -> None:
        self._problem = copy.deepcopy(problem).double()

    def __call__(self, position: Params) -> tuple[float, float | None]:
        """(F*, the test error)."""
        outer = {name: value.double() for name, value in position.items()}
        params = inner_optimum(self._problem, outer)
        return float(self._problem.outer_loss(params, outer)), self._problem.test_error(params)

    def first_below(self, positions: list[Params], target: float) -> int | None:
        """The first step at which F* is at most `target`, taken to stay there."""
        low, high = 0, len(positions) - 1
        if not positions or not self(positions[high])[0] <= target:
            return None
        while low < high:
            middle = (low + high) // 2
            if self(positions[middle])[0] <= target:
                high = middle
            else:
                low = middle + 1
        return low


def run(name: str, method: str, part: float, seconds: float) -> Run:
    """Descend for so many processor seconds."""
    problem = PROBLEMS[name]()
    made = Run(method, part * problem.outer_rate)
    count = 0
    loss = problem.inner_loss

    def counted(params: Params, batch: Params) -> torch.Tensor:
        nonlocal count
        count += 1
        return loss(params, batch)

    problem.inner_loss = counted  # type: ignore[method-assign]
    products: list[int] = []
    leaves = list(problem.position.values())
    optimizer = torch.optim.SGD(leaves, lr=made.rate)
    try:
        call = METHODS[method](problem, products)
        call(), call()
        count, before, start = 0, len(products), time.process_time()
        while time.process_time() - start < seconds or not made.positions:
            for leaf, slope in zip(leaves, call(), strict=True):
                leaf.grad = slope
            optimizer.step()
            made.positions.append({k: x.detach().clone() for k, x in problem.position.items()})
            made.seconds.append(time.process_time() - start)
            made.evaluations.append(count + sum(products[before:]))
    except bilevel.errors.BilevelError as error:
        made.remark = f"{type(error).__name__}: {str(error)[:120]}"
    return made


def referee(name: str, methods: list[str], seconds: float, progress: Any) -> list[dict[str, Any]]:
    """One row a method: the run of that outer rate which ended lowest."""
    problem = PROBLEMS[name]()
    judge = Judge(problem)
    ends: dict[str, tuple[float, float | None, Run]] = {}
    for method in methods:
        progress.set_description(f"{name}: {method}")
        for part in RATES:
            made = run(name, method, part, seconds)
            value, error = judge(made.positions[-1]) if made.positions else (math.inf, None)
            if method not in ends or value < ends[method][0]:
                ends[method] = value, error, made
        progress.update()
    begin, best = judge(problem.outer)[0], min(value for value, _, _ in ends.values())
    rows = []
    for method, (value, error, made) in ends.items():
        row: dict[str, Any] = {
            "problem": name,
            "method": method,
            "outer rate": made.rate,
            "steps": len(made.positions),
            "F*": value if math.isfinite(value) else None,
            "test": error,
        }
        for part in PARTS:
            step = judge.first_below(made.positions, begin + part * (best - begin))
            row[f"s, {part:.0%}"] = None if step is None else made.seconds[step]
            row[f"evals, {part:.0%}"] = None if step is None else made.evaluations[step]
        rows.append({**row, "remark": made.remark})
    return rows


FORMATS = {
    "outer rate": ".2g",
    "steps": "d",
    "F*": ".4g",
    "test": ".3f",
    "s, 90%": ".2f",
    "evals, 90%": "d",
    "s, 99%": ".2f",
    "evals, 99%": "d",
}


def shown(rows: list[dict[str, Any]]) -> str:
    """The table of one problem, the fastest first."""

    def order(row: dict[str, Any]) -> tuple[float, float]:
        found = [row[f"s, {part:.0%}"] for part in PARTS]
        ends = [math.inf if seconds is None else seconds for seconds in found]
        return ends[-1], ends[0]

    lines = [
        {"method": row["method"]}
        | {name: "–" if row[name] is None else format(row[name], f) for name, f in FORMATS.items()}
        for row in sorted(rows, key=order)
    ]
    return f"{rows[0]['problem']}\n\n{markdown(lines)}\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=available())
    parser.add_argument("--seconds", type=float, default=10.0, help="of a run at one outer rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="0.6 seconds a run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    args = parser.parse_args()
    args.seconds = 0.6 if args.short else args.seconds
    if args.seconds <= 0 or args.threads < 1:
        parser.error("seconds must be above 0, and threads at least 1")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    # Solvers are stopped early on purpose, and forward mode scripts PyTorch's decompositions.
    warnings.simplefilter("ignore", bilevel.ConvergenceWarning)
    warnings.filterwarnings("ignore", message=".torch.jit.script")
    rows: list[dict[str, Any]] = []
    tables = []
    with tqdm(total=len(args.problems) * len(args.methods), disable=None) as progress:
        for name in args.problems:
            found = referee(name, args.methods, args.seconds, progress)
            rows += found
            tables.append(shown(found))
            if args.json is not None:
                write_json(args.json, rows, {"seconds a run": args.seconds})
    print(" | ".join(f"{name}: {value}" for name, value in machine().items()), end="\n\n")
    print("\n".join(tables))


if __name__ == "__main__":
    main()
