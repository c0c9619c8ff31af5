"""What the checks of the user's methods cost: a hypergradient with and without them, in turns.

After the first two calls, that is: those look closer, and what they take is told beside it.
`docs/contract.md` says what is checked.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import table, write_json
from inner_methods import ours
from inner_problems import MAML, LearnedRate, LinearCleaning, NetworkCleaning, Penalties

from bilevel import hypergradient
from bilevel.recording import inner, trajectory

PROBLEMS = (MAML, Penalties, LinearCleaning, NetworkCleaning, LearnedRate)
COLUMNS = {
    "problem": "",
    "steps": "d",
    "graph": "",
    "ms": ".2f",
    "checks, ms": ".3f",
    "checks, %": ".2f",
    "first call": ".1f",
    "second call": ".1f",
}


def call_unchecked(self: inner.InnerLoop, name: str, *args: Any, **kwargs: Any) -> Any:
    with contextlib.nullcontext() if torch.is_grad_enabled() else torch.enable_grad():
        return getattr(self.problem, name)(*args, **kwargs)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Inside, nothing is looked at."""
    replaced = (
        (inner.InnerLoop, "_call", call_unchecked),
        (inner, "check_scalar", lambda value, name: value),
        (inner, "check_params", lambda params: None),
        (inner, "check_hyperparameters", lambda values: values),
        (trajectory.Trajectory, "check_repeated", lambda self, losses: None),
        (hypergradient, "check_finite", lambda result: None),
        (hypergradient, "inside_transform", lambda: False),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def measure(kind: Any, budget: int | None, least: float) -> dict[str, Any]:
    """One row: medians over pairs, whose order changes every time, for `least` seconds."""
    problem = kind()
    ours(problem)()  # what PyTorch does only once
    call = ours(problem, graph_budget=budget)
    first, second = seconds(call), seconds(call)
    with_checks, without = [], []
    ends, turn = time.monotonic() + least, 0
    while turn < 10 or time.monotonic() < ends:
        for checked in ((True, False), (False, True))[turn % 2]:
            with contextlib.nullcontext() if checked else unchecked():
                (with_checks if checked else without).append(seconds(call))
        turn += 1
    usual = statistics.median(without)
    extra = statistics.median(a - b for a, b in zip(with_checks, without, strict=True))
    return {
        "problem": kind.__name__,
        "steps": problem.steps,
        "graph": "recorded" if budget is None else "of one step",
        "ms": 1e3 * usual,
        "checks, ms": 1e3 * extra,
        "checks, %": 100 * extra / usual,
        "first call": first / usual,
        "second call": second / usual,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=30, help="for each row, at least")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(kind, budget, options.seconds) for kind in PROBLEMS for budget in (None, 0)]
    print(table(rows, COLUMNS))
    if options.json:
        long = max(row["checks, %"] for row in rows if row["steps"] >= 100)
        short = max(row["checks, ms"] for row in rows if row["steps"] < 100)
        summary = {"most_percent_of_100_steps": long, "most_ms_of_fewer_steps": short}
        write_json(options.json, rows, summary)


if __name__ == "__main__":
    main()
