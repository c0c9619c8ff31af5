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
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import inner_implicit
import inner_methods
import numpy as np
import platformdirs
import torch
from common import FAITHFUL_MALLOC, machine, markdown, peak_memory, table, write_json
from inner_problems import PROBLEMS
from plot import Series, draw
from tqdm import tqdm
from turns import Worker, serve

HERE = Path(__file__).parent
JAX = ["jax>=0.9,<0.11", "optax>=0.2.6,<0.3", "jaxopt>=0.8.5,<0.9"]
UNROLLED = ("plain", "ours", "compiled", "higher", "torchopt", "boat", "jax", "jax-remat")
IMPLICIT = ("plain", "ours", "compiled", "jax", "jaxopt")
METHODS = tuple(dict.fromkeys((*UNROLLED, *IMPLICIT)))
NAMES = (*PROBLEMS, *inner_implicit.ITERATIONS)

COLUMNS = {
    "problem": "s",
    "batches": "s",
    "method": "s",
    "time/plain": ".2f",
    "wall/plain": ".2f",
    "least": ".2f",
    "most": ".2f",
    "ms": ".1f",
    "first s": ".1f",
    "again s": ".1f",
    "MB": ".1f",
    "MB 2T": ".1f",
    "error": ".1e",
}


def make(problem: str, fresh: bool, length: float) -> Any:
    """The problem of this name."""
    if problem in inner_implicit.ITERATIONS:
        return inner_implicit.Optimum(inner_implicit.ITERATIONS[problem])
    return PROBLEMS[problem](length, fresh=fresh)


def exact(problem: str, fresh: bool, length: float) -> np.ndarray:
    """The hypergradient in float64, flat."""
    made = make(problem, fresh, length)
    found = (
        made.exact()
        if problem in inner_implicit.ITERATIONS
        else inner_methods.plain(made.double())()
    )
    return torch.cat([each.ravel() for each in found]).numpy()


def work(args: argparse.Namespace) -> None:
    """What a process of PyTorch does: be a worker, or tell its peak memory."""
    problem, fresh, length, method, gradient, mode = args.work
    torch.set_num_threads(args.threads)
    made = make(problem, fresh == "fresh", float(length))
    methods: Any = inner_implicit if problem in inner_implicit.ITERATIONS else inner_methods
    if mode == "turns":
        serve(lambda: methods.METHODS[method](made), Path(gradient))
        return
    call = methods.METHODS[method](made)
    call()
    print(json.dumps({"MB": peak_memory(call)}))


class Bench:
    """All processes of one problem.

    Args:
        problem: Its name.
        fresh: Whether every step has a batch of its own.
        args: The command line.
        folder: For data, gradients and compilers' caches.
        jax: The Python of JAX's environment.
    """

    def __init__(
        self, problem: str, fresh: bool, args: argparse.Namespace, folder: Path, jax: str
    ) -> None:
        self.problem, self.fresh, self.args, self.jax = problem, fresh, args, jax
        self.folder = folder / f"{problem}-{fresh}"
        self.folder.mkdir()
        self.offered = IMPLICIT if problem in inner_implicit.ITERATIONS else UNROLLED

    def process(self, method: str, mode: str, length: float) -> tuple[list[str], dict[str, str]]:
        """The command and the environment of one process."""
        gradient = self.folder / f"{method}.npy"
        environment = {
            "OMP_NUM_THREADS": str(self.args.threads),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / method),
        }
        if mode == "memory":
            environment |= FAITHFUL_MALLOC
        if method.startswith("jax"):
            data = self.folder / f"data-{length}.npz"
            if not data.exists():
                made = make(self.problem, self.fresh, length)
                tensors = {name: value.numpy() for name, value in made.tensors().items()}
                data.with_suffix(".json").write_text(json.dumps(made.settings()))
                np.savez(data, **tensors)
            words = [self.jax, str(HERE / "inner_jax.py"), self.problem, method, str(data)]
            return [*words, str(gradient), mode], environment
        batches = "fresh" if self.fresh else "shared"
        words = [self.problem, batches, str(length), method, str(gradient), mode]
        start = [sys.executable, str(HERE / "inner_loops.py"), f"--threads={self.args.threads}"]
        return [*start, "--work", *words], environment

    def memory(self, method: str, length: float) -> float | None:
        """Peak MB of one method, in a process of its own."""
        words, environment = self.process(method, "memory", length)
        found = subprocess.run(
            words, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        return json.loads(found.stdout)["MB"] if found.returncode == 0 else None

    def rows(self, done: Callable[[str], None]) -> list[dict[str, Any]]:
        """One row a method; those that cannot say the problem have a remark and nothing else."""
        methods = [name for name in self.offered if name in self.args.methods]
        truth = exact(self.problem, self.fresh, self.args.length)
        workers: dict[str, Worker] = {}
        again: dict[str, float | None] = {}
        turns: dict[str, list[dict[str, float]]] = {}
        with contextlib.ExitStack() as stack:
            for method in methods:
                done(f"first call of {method}")
                process = self.process(method, "turns", self.args.length)
                workers[method] = stack.enter_context(contextlib.closing(Worker(*process)))
                if "absent" not in workers[method].first:
                    turns[method] = []
                    second = Worker(*process)
                    again[method] = second.first.get("first_seconds")
                    second.close()
            for method in turns:
                workers[method].turn()  # which also says how many calls fit into one
            for _ in range(self.args.rounds):
                for method, found in turns.items():
                    done(f"time of {method}")
                    found.append(workers[method].turn())
        lengths = [] if self.args.no_memory else [self.args.length, 2 * self.args.length]
        if self.problem in inner_implicit.ITERATIONS:
            lengths = lengths[:1]
        memory: dict[tuple[str, float], float | None] = {}
        cases = [(method, length) for method in turns for length in lengths]
        # Side by side, since nothing is timed here.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for case, value in zip(cases, pool.map(lambda c: self.memory(*c), cases), strict=True):
                done(f"memory of {case[0]}")
                memory[case] = value
        rows = []
        for method in methods:
            row: dict[str, Any] = dict.fromkeys(COLUMNS)
            row |= {"problem": self.problem, "batches": "fresh" if self.fresh else "shared"}
            row |= {"method": method, "remark": workers[method].first.get("absent", "")}
            if method in turns:
                gradient = np.load(self.folder / f"{method}.npy").astype(np.float64)
                ratios = {
                    clock: [
                        mine[clock] / plain[clock]
                        for mine, plain in zip(turns[method], turns["plain"], strict=True)
                    ]
                    for clock in ("cpu_seconds", "seconds")
                }
                row |= {
                    "time/plain": statistics.median(ratios["cpu_seconds"]),
                    "wall/plain": statistics.median(ratios["seconds"]),
                    "least": min(ratios["cpu_seconds"]),
                    "most": max(ratios["cpu_seconds"]),
                    "ms": 1e3 * min(turn["cpu_seconds"] for turn in turns[method]),
                    "first s": workers[method].first["first_seconds"],
                    "again s": again[method],
                    "MB": memory.get((method, self.args.length)),
                    "MB 2T": memory.get((method, 2 * self.args.length)),
                    "error": float(np.linalg.norm(gradient - truth) / np.linalg.norm(truth)),
                }
            rows.append(row)
        return rows


def jax_python() -> str:
    """The Python of an environment that has JAX, made if there is none yet."""
    cache = os.environ.get("BILEVEL_CACHE")
    folder = Path(cache).expanduser() if cache else platformdirs.user_cache_path("bilevel-dd")
    folder = folder / "jax"
    python = folder / "bin" / "python"
    ready = folder / "requirements.txt"
    if not ready.exists() or ready.read_text().split("\n") != JAX:
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *JAX], check=True)
        ready.write_text("\n".join(JAX))
    return str(python)


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
    """Memory against time, a panel for each problem, its points the steps T and 2T."""
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
