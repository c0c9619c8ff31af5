"""A method's run on a problem of the referee, in a process of its own, and how it is judged."""

import copy
import json
import math
import multiprocessing
import os
import subprocess
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from inner_implicit import inner_optimum
from inner_problem import Call, Params
from inner_processes import hand_over
from referee_problems import RefereeProblem
from torch.autograd import grad

import bilevel

#: F where it is not finite.
NOWHERE = 1e30


def nothing() -> None:
    """Nothing is carried from one run to the next."""


class Hypergradients(NamedTuple):
    """A method on one problem: the hypergradient at `position`, and how to forget the last run."""

    call: Call
    restart: Callable[[], None] = nothing


@dataclass
class Run:
    """φ after every outer step, and what it had cost by then."""

    positions: list[Params] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    remark: str = ""


class Competitor(ABC):
    """A method that descends.

    Attributes:
        first_seconds: Processor seconds of its first call.
    """

    first_seconds: float

    @abstractmethod
    def descend(self, seed: int, rate: float, seconds: float) -> Run:
        """Outer gradient descent from φ_0 of a seed, for so many processor seconds."""


@final
class OfTorch(Competitor):
    """A method in this process.

    Args:
        problem: Its inner loss is counted from now on.
        make: Takes the problem and a list to which every call adds its Hessian-vector products.
        counts: False for what compiles the inner loss, where nothing can be counted.
    """

    def __init__(
        self,
        problem: RefereeProblem,
        make: Callable[[RefereeProblem, list[int]], Hypergradients],
        *,
        counts: bool = True,
    ) -> None:
        self.problem, self._count, self._products = problem, 0, []
        loss = problem.inner_loss

        def counted(params: Params, batch: Params) -> torch.Tensor:
            self._count += 1
            return loss(params, batch)

        if counts:
            problem.inner_loss = counted  # type: ignore[method-assign]
        problem.begin(0)
        start = time.process_time()
        self._made = make(problem, self._products)
        self._made.call()
        self.first_seconds = time.process_time() - start
        # What is checked or compiled at second calls, and at another φ_0.
        self._made.call()
        self._begin(1)
        self._made.call()

    def descend(self, seed: int, rate: float, seconds: float) -> Run:
        made, problem = Run(), self.problem
        leaves = list(problem.position.values())
        optimizer = torch.optim.SGD(leaves, lr=rate)
        self._begin(seed)
        self._count, self._products[:] = 0, []
        start = time.process_time()
        try:
            while time.process_time() - start < seconds or not made.positions:
                for leaf, slope in zip(leaves, self._made.call(), strict=True):
                    leaf.grad = slope
                optimizer.step()
                made.positions.append({k: x.detach().clone() for k, x in problem.position.items()})
                made.seconds.append(time.process_time() - start)
                made.evaluations.append(self._count + sum(self._products))
        except bilevel.errors.BilevelError as error:
            made.remark = f"{type(error).__name__}: {str(error)[:120]}"
        return made

    def _begin(self, seed: int) -> None:
        self.problem.begin(seed)
        self._made.restart()


@final
class OfJax(Competitor):
    """A method of `referee_jax.py`, in a process of its own.

    Args:
        problem: Handed over by files.
        method: Its name there.
        evaluations: Of one outer step.
        python: Of JAX's environment.
    """

    def __init__(self, problem: RefereeProblem, method: str, evaluations: int, python: str) -> None:
        self.problem, self._evaluations = problem, evaluations
        self._held = tempfile.TemporaryDirectory()
        self._folder = Path(self._held.name)
        hand_over(problem, self._folder / "data.npz")
        script = Path(__file__).with_name("referee_jax.py")
        words = [python, str(script), problem.form, method, str(self._folder / "data.npz")]
        self._process = subprocess.Popen(
            [*words, str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.first_seconds = self._answer()["first"]

    def descend(self, seed: int, rate: float, seconds: float) -> Run:
        self.problem.begin(seed)
        begin = {name: value.detach().numpy() for name, value in self.problem.position.items()}
        np.savez(self._folder / "start.npz", **begin)
        self._process.stdin.write(json.dumps({"rate": rate, "seconds": seconds}) + "\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        times = self._answer()["seconds"]
        with np.load(self._folder / "positions.npz") as held:
            stacked = {name: torch.from_numpy(held[name]) for name in held.files}
        return Run(
            [{name: each[step] for name, each in stacked.items()} for step in range(len(times))],
            times,
            [self._evaluations * (step + 1) for step in range(len(times))],
        )

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError("JAX's process ended")
        return json.loads(line)


@final
class Judge:
    """F at what the problem is about, in float64: the inner optimum, or the end of the run.

    Attributes:
        test_error: At what was judged last, where there are test examples.
    """

    test_error: float | None = None

    def __init__(self, problem: RefereeProblem) -> None:
        self._problem = copy.deepcopy(problem).double()
        self._at_first = copy.deepcopy(problem)
        self._last: Params | None = None

    def __call__(self, position: Params) -> float:
        """F at φ."""
        outer = {name: value.detach().double() for name, value in position.items()}
        if not all(bool(torch.isfinite(value).all()) for value in outer.values()):
            return NOWHERE
        if self._problem.converges:
            params = inner_optimum(self._problem, outer, self._last, 1e-7)
            self._last = params
        else:
            params = end_of_run(self._problem, outer)
        self.test_error = self._problem.test_error(params)
        found = float(self._problem.outer_loss(params, outer))
        return found if math.isfinite(found) else NOWHERE

    def begin(self, seed: int) -> float:
        """F at φ_0."""
        self._at_first.begin(seed)
        return self(self._at_first.position)

    def curve(self, made: Run, ratio: float) -> list[tuple[float, int, float]]:
        """(seconds, evaluations, F) after some of the steps, `ratio` times as many each time."""
        last = len(made.positions)
        chosen = {min(last, round(ratio**power)) for power in range(60)}
        return [
            (
                round(made.seconds[k - 1], 5),
                made.evaluations[k - 1],
                float(f"{self(made.positions[k - 1]):.8g}"),
            )
            for k in sorted(chosen)
            if 0 < k <= last
        ]


def end_of_run(problem: RefereeProblem, outer: Params) -> Params:
    """θ_T."""
    params = {name: value.clone() for name, value in problem.start.items()}
    velocity = {name: torch.zeros_like(value) for name, value in params.items()}
    for step in range(problem.steps):
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        gradient = grad(problem.inner_loss(leaves, problem.batch(outer, step)), leaves.values())
        for (name, value), slope in zip(params.items(), gradient, strict=True):
            velocity[name] = problem.momentum * velocity[name] + slope
            params[name] = value - problem.rate * velocity[name]
    return params


def in_a_process(function: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows that it returns in a fork of this process, or one with the reason if it fails."""

    def work() -> None:
        try:
            # Solvers are stopped early on purpose, and libraries warn of each other's age.
            warnings.simplefilter("ignore")
            with tempfile.TemporaryDirectory() as cache:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
                found = function()
        except Exception as error:  # whatever a library raises
            found = [{"remark": f"{type(error).__name__}: {str(error).strip()[:200]}"}]
        sending.send(found)

    fork = multiprocessing.get_context("fork")
    receiving, sending = fork.Pipe(duplex=False)
    process = fork.Process(target=work)
    process.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError:
        return [{"remark": "its process ended"}]
    finally:
        process.join()
