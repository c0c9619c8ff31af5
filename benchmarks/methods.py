"""Truncation schedules and estimators side by side: accuracy against equal time.

Every method distils CIFAR-10 to one image per class for the time of --steps outer steps of
RaT-BPTT, eager, from the same real images and the same initialisations by seed. What an outer step
of each method costs is measured first, all in turns in one process, and decides how many of them it
gets: so a slow moment of the machine changes no result, and a run can be repeated elsewhere. The
set is judged at every part of that time in --parts, by fresh networks after 300 training steps on
the whole test set: no number of steps and no set is chosen.

Methods (T 60, W 20, unless it says otherwise)
    BPTT                  the whole run.
    T-BPTT                the last 20 steps.
    first 15              control: runs of 15 steps, whole; what the released AT-BPTT came to here.
    RaT-BPTT              a random window.
    AT position           AT-BPTT with a fixed width: only where the window lies is adapted.
    AT width              AT-BPTT with uniform positions: only the width is adapted, in 15 … 25.
    AT-BPTT               both, stages by thirds of the run, 5 outer steps a recording.
    AT-BPTT++             the policy over inner steps; the run's start cuts windows, as released.
    AT-BPTT++ whole       the same with whole windows only.
    AT-BPTT low rank      AT-BPTT with `LowRank()` in place of the exact adjoint.
    RaT easy first        RaT-BPTT on real images paced by difficulty, easy ones first.
    RaT hard first        the same, hard ones first. Scored by one network after two epochs, which
                          is not in the time of any paced method.
    AT easy first         AT-BPTT on real images paced by its stages, easy ones first.
    AT hard first         the same, hard ones first.

    python benchmarks/methods.py --data data --json results.json --plot results.png

Every finished run is written at once; a rerun with the same --json goes on after the last one.
Costs are in --costs, and measured if there is no such file. Several processes, each with seeds or
methods and a --json of its own, share them, and are joined by --merge.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from common import table, write_json
from distil import ROOT, accuracy, distil, distillation

from bilevel.estimators import Adjoint, LowRank
from bilevel.truncation import (
    ByFraction,
    Full,
    Last,
    RandomWindow,
    Softmax,
    StageAware,
    WithinTrajectoryPolicy,
)
from dd import config
from dd.cli import keep_freed_memory
from dd.data.prepared import PreparedData
from dd.distillation.loop import Ready, outer_loop
from dd.evaluation.evaluator import Evaluator
from dd.experiment import Experiment
from dd.objectives.difficulty import DifficultyPacing

STEPS, WINDOW, RANGE = 60, 20, 5
#: Outer steps over which a cost is measured: in each stage a recording and four steps that use it.
COST_STEPS = 15
#: A temperature at which every inner step is as likely as any other.
UNIFORM = 1e9


def stage_aware(**options: Any) -> StageAware:
    given = {"width_range": RANGE, "refresh": 5, **options}
    return StageAware(WINDOW, transition=ByFraction(), **given)


#: The schedule, the length of the inner run, the estimator, the order of the real images.
METHODS: dict[str, tuple[Callable[[], Any], int, Callable[[], Any], str | None]] = {
    "BPTT": (Full, STEPS, Adjoint, None),
    "T-BPTT": (lambda: Last(WINDOW), STEPS, Adjoint, None),
    "first 15": (Full, 15, Adjoint, None),
    "RaT-BPTT": (lambda: RandomWindow(WINDOW), STEPS, Adjoint, None),
    "AT position": (lambda: stage_aware(width_range=0), STEPS, Adjoint, None),
    "AT width": (
        lambda: stage_aware(distribution=Softmax(temperature=UNIFORM)),
        STEPS,
        Adjoint,
        None,
    ),
    "AT-BPTT": (stage_aware, STEPS, Adjoint, None),
    "AT-BPTT++": (
        lambda: WithinTrajectoryPolicy(WINDOW, RANGE, partial_windows="cut"),
        STEPS,
        Adjoint,
        None,
    ),
    "AT-BPTT++ whole": (lambda: WithinTrajectoryPolicy(WINDOW, RANGE), STEPS, Adjoint, None),
    "AT-BPTT low rank": (stage_aware, STEPS, LowRank, None),
    "RaT easy first": (lambda: RandomWindow(WINDOW), STEPS, Adjoint, "easy_first"),
    "RaT hard first": (lambda: RandomWindow(WINDOW), STEPS, Adjoint, "hard_first"),
    "AT easy first": (stage_aware, STEPS, Adjoint, "easy_first"),
    "AT hard first": (stage_aware, STEPS, Adjoint, "hard_first"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="data", help="folder of CIFAR-10")
    parser.add_argument("--gin_param", action="append", default=[], help="as of dd.train")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=900, help="outer steps of RaT-BPTT")
    parser.add_argument("--costs", type=Path, default=Path("runs/methods_costs.json"))
    parser.add_argument("--cost-rounds", type=int, default=3)
    parser.add_argument("--parts", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--width", type=int, default=32, help="of the ConvNet-3")
    parser.add_argument("--real-batch", type=int, default=500)
    parser.add_argument("--networks", type=int, default=3, help="for each set")
    parser.add_argument("--paced-steps", type=int, default=100, help="until RaT draws all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--merge", type=Path, nargs="*", help="only join these, and draw")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()

    rows = [
        row
        for path in (options.merge or [options.json])
        if path.exists()
        for row in json.loads(path.read_text())["rows"]
    ]
    if options.merge is None:
        experiment, data = prepare(options)
        if not options.costs.exists():
            write_json(options.costs, [], measure_costs(experiment, data, options))
        costs = json.loads(options.costs.read_text())["summary"]
        done = {(row["method"], row["seed"]) for row in rows}
        for seed in options.seeds:
            for method in options.methods:
                if (method, seed) not in done:
                    steps = round(options.steps * costs["RaT-BPTT"] / costs[method])
                    rows.append(measure(experiment, data, method, seed, steps, options))
                    write_json(options.json, rows, summary(rows))
                    print(rows[-1], flush=True)
    write_json(options.json, rows, summary(rows))
    print(table(mean_rows(rows), dict.fromkeys(mean_rows(rows)[0], "")))
    if options.plot is not None:
        draw(rows, options.plot)


def prepare(options: Any) -> tuple[Experiment, PreparedData]:
    bindings = [
        f"cifar10.root = {options.data!r}",
        f"ConvNet.width = {options.width}",
        "Distiller.minutes = None",
        "Distiller.snapshot_minutes = []",
        f"RealImages.real_batch = {options.real_batch}",
        "RealImages.precision = None",
        "Distiller.compile = False",
        "Distiller.image_every = 100000",
        *options.gin_param,
    ]
    experiment = config.load([str(ROOT / "gin" / "cifar10_cpu.gin")], bindings)
    data = experiment.prepare()
    # Nothing is chosen, so the validation split is only looked at by the evaluator's routine.
    few = {
        "validation_images": data.validation_images[:100],
        "validation_labels": data.validation_labels[:100],
    }
    return experiment, replace(data, **few)


def set_up(experiment: Experiment, method: str, steps: int, options: Any) -> None:
    """Make the experiment's distiller one of this method, for so many outer steps."""
    distiller = experiment.distiller
    schedule, distiller.inner_steps, estimator, order = METHODS[method]
    distiller.truncation, distiller.estimator = schedule(), estimator()
    pacing = None
    if order is not None:
        over_steps = options.paced_steps if distiller.truncation.stage is None else None
        pacing = DifficultyPacing(over_steps, order, networks=1, epochs=2)
    distiller.objective.pacing = pacing
    distiller.outer_steps = steps


def measure_costs(
    experiment: Experiment, data: PreparedData, options: Any
) -> dict[str, float | None]:
    """Seconds of an outer step of every method, the least of some rounds in turns.

    Each time over a short run through all three stages, whose shares of recordings are those of a
    long one. Which real images are drawn costs nothing; their scores are not in the time.
    """
    least: dict[str, float | None] = {}
    for _ in range(options.cost_rounds):
        for method in METHODS:
            set_up(experiment, method, COST_STEPS, options)
            experiment.distiller.objective.pacing = None
            state = distil(experiment, data, 0).state
            found, before = state.seconds / COST_STEPS, least.get(method)
            least[method] = found if before is None else min(found, before)
    return least


def measure(
    experiment: Experiment, data: PreparedData, method: str, seed: int, steps: int, options: Any
) -> dict[str, Any]:
    """Distil once and judge the set along the way."""
    set_up(experiment, method, steps, options)
    evaluator = Evaluator(networks=options.networks, steps=[300])
    found, seconds, began = {}, 0.0, time.process_time()
    run = distillation(experiment, data, seed)
    for event in outer_loop(run):
        parts = [part for part in options.parts if round(part * steps) == event.step]
        if isinstance(event, Ready) and parts:
            seconds += time.process_time() - began
            value = accuracy(run.candidate("images"), experiment.network, evaluator, data, seed)
            found |= {f"{part:g}": value for part in parts}
            began = time.process_time()
    return {
        "method": method,
        "seed": seed,
        "outer_steps": run.state.step,
        "cpu_seconds": seconds,
        "accuracy": found,
    }


def groups(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {
        method: found
        for method in METHODS
        if (found := [row for row in rows if row["method"] == method])
    }


def spread(values: list[float]) -> tuple[float, float]:
    """(mean, standard deviation) in %."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return 100 * statistics.fmean(values), 100 * deviation


def mean_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean ± standard deviation over seeds, for every part of the time."""
    result = []
    for method, group in groups(rows).items():
        steps = statistics.fmean(row["outer_steps"] for row in group)
        cells: dict[str, Any] = {"method": method, "outer steps": f"{steps:.0f}"}
        for part in group[0]["accuracy"]:
            mean, deviation = spread([row["accuracy"][part] for row in group])
            cells[f"at {part}"] = f"{mean:.1f} ± {deviation:.1f}"
        result.append(cells)
    return result


def summary(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    return {
        f"{method}_at_{part}": spread([row["accuracy"][part] for row in group])[0]
        for method, group in groups(rows).items()
        for part in group[0]["accuracy"]
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against the part of the time that has passed."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for index, (method, group) in enumerate(groups(rows).items()):
        parts = list(group[0]["accuracy"])
        points = [spread([row["accuracy"][part] for row in group]) for part in parts]
        axes.errorbar(
            [float(part) * (1 + 0.006 * (index - 6)) for part in parts],
            [mean for mean, _ in points],
            [deviation for _, deviation in points],
            marker="osd^v<>px*+hHD"[index],
            linestyle="--" if "first" in method else "-",
            capsize=3,
            label=method,
        )
    axes.set(xlabel="part of the time", ylabel="test accuracy, %, mean ± std over seeds")
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
