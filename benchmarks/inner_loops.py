"""One hypergradient through small inner loops, side by side with other libraries.

Methods
    plain       The loop one would write: autograd through the window.
    ours        `bilevel.Hypergradient` by its defaults.
    compiled    The same with `compile=True`.
    higher      `higher.optim`.
    torchopt    TorchOpt's functional optimizers, of which its `MetaSGD` and `MetaAdam` are made.
    boat        BOAT, naive gradient descent with reverse automatic differentiation. It takes one
                batch for all steps, SGD, and no window, learned start or learned rate.
    jax         One `jit`-compiled `scan` and its gradient; jax-remat recomputes every step.
    jaxopt      Implicit problems only, `custom_root` with conjugate gradients.

hypertorch is not among them: it is on no package index (the package of that name is another).

Problems are those of `inner_problems.py`, and "implicit-10" and "implicit-50": a hypergradient at
an inner optimum by so many iterations of conjugate gradients, where plain is the textbook's loop.
Batches: "shared", one for all steps; "fresh", drawn anew for every step.

Columns
    time/plain  Processor seconds of this method over those of plain in the same round; the median
                over rounds. Each method is a process of its own, and they take turns.
    wall/plain  The same for seconds of the clock.
    least, most time/plain of the round where it was least and most.
    ms          Processor milliseconds of a call; the least.
    first s     The first call with everything it imports, traces and compiles, no cache on disk.
    again s     The same in a second process, which finds what the first one left on disk.
    MB, MB 2T   Peak of the resident set during a call, above that before it, with the steps of the
                problem and with twice as many; of processes of their own, after a first call.
    error       ‖float32 − float64‖ / ‖float64‖ of the hypergradient. Plain gives the float64 one; a
                dense solve gives that of implicit problems.

Processes are held to --threads. JAX has an environment of its own, made by pip at the first use in
the user's cache folder (`BILEVEL_CACHE` names another), since it and PyTorch need not agree on
their dependencies.

    python benchmarks/inner_loops.py --json benchmarks/results/inner_loops_cpu.json
    python benchmarks/inner_loops.py --short
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import machine, markdown, table, write_json
from inner_processes import COLUMNS, METHODS, NAMES, PROBLEMS, Bench, jax_python, work
from plot import Series, draw
from tqdm import tqdm


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """time/plain of ours, eager and compiled, by problem."""
    return {
        f"{row['problem']}, {row['batches']}, {row['method']}": row["time/plain"]
        for row in rows
        if row["method"] in ("ours", "compiled")
    }


def short_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: time/plain of every method by problem, with the first call of what compiles."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = []
    for problem, batches in dict.fromkeys((row["problem"], row["batches"]) for row in rows):
        cells = {"problem": problem, "batches": batches}
        found = {r["method"]: r for r in rows if (r["problem"], r["batches"]) == (problem, batches)}
        for method in methods:
            row = found.get(method)
            ratio = None if row is None else row["time/plain"]
            if row is None or ratio is None:
                cells[method] = "–"
            elif method == "plain":
                cells["plain"] = f"{row['ms']:.1f} ms"
            else:
                first = f" ({row['first s']:.0f} s)" if method in ("compiled", "jax") else ""
                cells[method] = f"{ratio:.2f}{first}"
        lines.append(cells)
    return markdown(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Memory against time, a panel for each problem and a point for each method."""
    panels = {}
    for problem in dict.fromkeys(row["problem"] for row in rows if row["batches"] == "shared"):
        panels[problem] = [
            Series(row["method"], [(row["time/plain"], max(row["MB"], 0.1))])
            for row in rows
            if (row["problem"], row["batches"]) == (problem, "shared") and row["MB"]
        ]
    panels = {name: series for name, series in panels.items() if series}
    if panels:
        draw(panels, "time / plain", "peak memory, MB", path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batches", nargs="+", choices=("shared", "fresh"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--length", type=float, default=1.0, help="of the runs, 1 as above")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory columns")
    parser.add_argument(
        "--short", action="store_true", help="three problems by plain, ours and higher, two rounds"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the short table here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory against time here")
    parser.add_argument("--work", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1 or args.threads < 1 or args.length <= 0:
        parser.error("rounds and threads must be at least 1, and length above 0")
    if args.short:
        args.problems = ["penalties", "maml", "implicit-10"]
        args.methods, args.rounds = ["plain", "ours", "higher"], 2
    args.methods = list(dict.fromkeys(["plain", *args.methods]))
    args.batches = args.batches or (["shared"] if args.short else ["shared", "fresh"])
    return args


def main() -> None:
    args = parse()
    if args.work is not None:
        work(args)
        return
    jax = jax_python() if any(name.startswith("jax") for name in args.methods) else ""
    rows: list[dict[str, Any]] = []
    cases = [
        (problem, batches == "fresh")
        for batches in args.batches
        for problem in args.problems
        if batches == "shared" or problem in PROBLEMS
    ]
    with tempfile.TemporaryDirectory() as folder, tqdm(disable=None) as progress:

        def done(what: str) -> None:
            progress.set_description(what)
            progress.update()

        for problem, fresh in cases:
            bench = Bench(problem, fresh, args, Path(folder), jax)
            rows += bench.rows(lambda what, problem=problem: done(f"{problem}: {what}"))
            if args.json is not None:
                write_json(args.json, rows, summarise(rows))
    print(" | ".join(f"{name}: {value}" for name, value in machine().items()))
    print(table([row for row in rows if row["time/plain"] is not None], COLUMNS))
    print(short_table(rows))
    if args.markdown is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(short_table(rows) + "\n")
    if args.plot is not None:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
