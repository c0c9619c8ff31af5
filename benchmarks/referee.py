"""Whole bilevel problems, solved by every estimator that fits and by peers, by the clock.

Problems, after benchmark_bilevel, all in float32
    quadratic        100 parameters, condition 10; 20 outer scalars.
    logistic         Logistic regression on scikit-learn's breast cancer data, a penalty for each
                     of 30 features.
    cleaning-p       A linear softmax on 1000 of scikit-learn's digits, of which a part p have a
                     random label; a weight for each.
    cifar10          The same on 2000 photographs of CIFAR-10 at 8×8 pixels, half of them with a
                     random label.
    cifar10-network  A network of 24 hidden units on 1000 of them, judged where its 40 steps end;
                     the other problems are judged at the inner optimum.

Every method has the same outer gradient descent and the same inner run from θ_0, but "AmIGO" and
"SOBA" (`docs/estimators.md`), "boat, PGDO" and "boat, MESO", which go on from the last one. It has
a process of its own, and descends from one φ_0 for half of --seconds of processor time at each
outer rate of one grid; the rate that is first within a hundredth of the least F* of the three is
its rate for --seconds from each of --starts other φ_0. Clocks stand while it makes its first three
calls, with which imports, compilation, checks and caches are behind it, and while F*(φ) is judged,
in float64: the outer loss at the inner optimum of φ, by L-BFGS, or at the end of its run. The
digits have 1.5 times as many seconds, the photographs twice.

A gap is F* less the least that any method found from the same start, over what it was at first.
Seconds until a gap are interpolated between steps that were judged. Rows of the JSON, one a method
and start:
    curve        [processor seconds, evaluations, F*] at the start and after some of the steps.
                 Evaluations are of the inner loss, and Hessian-vector products, of which unrolled
                 methods take one for each step. Of compiled methods only products are counted.
    test         Test error at the last φ.
    first s      Processor seconds of the first call, with what it imports and compiles.

A method whose package is not installed is left out with a line that says so; `make bench` installs
the peers, and JAX gets an environment of its own. hypertorch is not among the peers: it is in a git
repository alone (the package of that name is another).

    python benchmarks/referee.py --cifar10 data --json FILE --plot FILE.png
    python benchmarks/referee.py --docs benchmarks/results/referee_cpu.json
"""

import argparse
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import machine, write_json
from referee_methods import METHODS, left_out
from referee_plot import plot
from referee_problems import RefereeProblem, problems
from referee_report import Curve, crossings, tables, write_docs
from referee_run import Judge, in_a_process
from tqdm import tqdm

#: Outer rates that are tried, in parts of the problem's own.
RATES = (3.0, 1.0, 0.3)


def compete(
    make: Callable[[], RefereeProblem], method: str, seconds: float, starts: int
) -> list[dict[str, Any]]:
    """A row for each start of one method on one problem, or one row with a remark."""
    problem = make()
    judge, limit = Judge(problem), seconds * problem.patience
    competitor = METHODS[method].enter(problem)
    pilots, remark = {}, ""
    for rate in [part * problem.outer_rate for part in RATES]:
        made = competitor.descend(0, rate, limit / 2)
        pilots[rate], remark = judge.curve(made, 4), made.remark
    chosen = best_rate(judge.begin(0), pilots)
    if chosen is None:
        return [{"remark": remark or "never below where it began"}]
    rows = []
    for start in range(1, starts + 1):
        made = competitor.descend(start, chosen, limit)
        row: dict[str, Any] = {"start": start, "rate": chosen, "steps": len(made.positions)}
        row["curve"] = [(0.0, 0, judge.begin(start)), *judge.curve(made, 2)]
        row |= {"test": judge.test_error, "first s": competitor.first_seconds}
        rows.append({**row, "remark": made.remark})
    return rows


def best_rate(first: float, pilots: dict[float, Curve]) -> float | None:
    """The rate that is first within a hundredth of the least F of all; None if none descends."""
    best = min((point[2] for curve in pilots.values() for point in curve), default=first)
    if not best < first:
        return None
    seconds = {
        rate: crossings([(0.0, 0, first), *curve], best)[0.01] for rate, curve in pilots.items()
    }
    return min(seconds, key=lambda rate: seconds[rate] or math.inf)


def write(path: Path, rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """As `common.write_json`, a row on each line."""
    write_json(path, [], {"seconds a run": args.seconds, "starts": args.starts})
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    path.write_text(path.read_text().replace('"rows": []', f'"rows": [\n{lines}\n  ]'))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar10", type=Path, metavar="DIR", help="holds cifar-10-batches-py")
    parser.add_argument("--problems", nargs="+", choices=problems(Path()), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seconds", type=float, default=0.25, help="of a run that counts")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="0.1 seconds a run, one start")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the result here; what it has is kept, and not run",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw gaps against seconds here")
    parser.add_argument(
        "--docs", type=Path, metavar="FILE", help="run nothing; write this result into the docs"
    )
    args = parser.parse_args()
    if args.short:
        args.seconds, args.starts = 0.1, 1
    if args.seconds <= 0 or args.threads < 1 or args.starts < 1:
        parser.error("seconds must be above 0, and threads and starts at least 1")
    offered = problems(args.cifar10)
    args.problems = args.problems or list(offered)
    if missing := [name for name in args.problems if name not in offered]:
        parser.error(f"{', '.join(missing)}: --cifar10 must name the folder of CIFAR-10")
    return args


def main() -> None:
    args = parse()
    if args.docs is not None:
        write_docs(args.docs)
        return
    torch.set_num_threads(args.threads)
    absent = {name: why for name, why in left_out().items() if name in args.methods}
    for name, why in absent.items():
        print(f"{name}: {why}")
    rows: list[dict[str, Any]] = []
    if args.json is not None and args.json.exists():
        rows = json.loads(args.json.read_text())["rows"]
    done = {(row["problem"], row["method"]) for row in rows}
    todo = [
        (name, method)
        for name in args.problems
        for method in args.methods
        if method not in absent and (name, method) not in done
    ]
    offered = problems(args.cifar10)
    for name, method in tqdm(todo, disable=None):
        found = in_a_process(
            functools.partial(compete, offered[name], method, args.seconds, args.starts)
        )
        both = {"problem": name, "method": method, "ours": METHODS[method].ours}
        rows += [both | row for row in found]
        if args.json is not None:  # which may take long, and be gone on with
            write(args.json, rows, args)
    if args.json is not None:
        write(args.json, rows, args)
    print(" | ".join(f"{name}: {value}" for name, value in machine().items()), end="\n\n")
    print(tables(rows))
    if args.plot is not None:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
