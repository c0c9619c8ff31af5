"""The processes of `inner_loops.py`: what each does, and all of one problem taking turns."""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import inner_implicit
import inner_methods
import numpy as np
import platformdirs
import torch
from common import FAITHFUL_MALLOC, peak_memory
from inner_problems import PROBLEMS
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

#: What leaves something on disk that a second process finds.
CACHED = ("compiled",)


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


def hand_over(problem: Any, path: Path) -> None:
    """Write what `inner_jax.Data` reads: the tensors, as NPZ, and the numbers beside it."""
    tensors = {name: value.detach().numpy() for name, value in problem.tensors().items()}
    path.with_suffix(".json").write_text(json.dumps(problem.settings()))
    np.savez(path, **tensors)


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
                hand_over(make(self.problem, self.fresh, length), data)
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
        """One row a method."""
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
                if "absent" in workers[method].first:
                    continue
                turns[method] = []
                if method in CACHED:
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
        return [
            self._row(name, workers[name].first, turns, again, memory, truth) for name in methods
        ]

    def _row(
        self,
        method: str,
        first: dict[str, Any],
        turns: dict[str, list[dict[str, float]]],
        again: dict[str, float | None],
        memory: dict[tuple[str, float], float | None],
        truth: np.ndarray,
    ) -> dict[str, Any]:
        """What was found of one method, or the remark that it has nothing to show."""
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row |= {"problem": self.problem, "batches": "fresh" if self.fresh else "shared"}
        row |= {"method": method, "remark": first.get("absent") or first["remark"]}
        if method not in turns:
            return row
        gradient = np.load(self.folder / f"{method}.npy").astype(np.float64)
        both = list(zip(turns[method], turns["plain"], strict=True))
        ratios = [mine["cpu_seconds"] / plain["cpu_seconds"] for mine, plain in both]
        return row | {
            "time/plain": statistics.median(ratios),
            "wall/plain": statistics.median(
                mine["seconds"] / plain["seconds"] for mine, plain in both
            ),
            "least": min(ratios),
            "most": max(ratios),
            "ms": 1e3 * min(turn["cpu_seconds"] for turn in turns[method]),
            "first s": first["first_seconds"],
            "again s": again.get(method),
            "MB": memory.get((method, self.args.length)),
            "MB 2T": memory.get((method, 2 * self.args.length)),
            "error": float(np.linalg.norm(gradient - truth) / np.linalg.norm(truth)),
        }


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
