"""MTT against ATT at inner lengths of 0.5, 1 and 2 times the tuned one, on CIFAR-10.

    python benchmarks/trajectory_matching.py --data data --json results.json --plot results.png

Trains the experts of `gin/cifar10_experts_cpu.gin` first, unless they are there. Every finished run
is written at once; a rerun with the same --json goes on after the last one.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from common import table, write_json
from distil import ROOT, distillation

from bilevel import Key
from bilevel.truncation import Full, MinimumDistance
from dd import config
from dd.cli import keep_freed_memory
from dd.data.prepared import PreparedData
from dd.distillation.loop import Stepped, outer_loop
from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.evaluator import Evaluator
from dd.experiment import Experiment
from dd.networks import VGG11, AlexNet, ConvNet
from dd.objectives.expert_buffer import ExpertWriter
from dd.runtime.stopping import StopRequest

#: Narrow forms, so that all of this fits on one CPU thread.
ARCHITECTURES = {
    "ConvNet": lambda: ConvNet(10, width=16),
    "AlexNet": lambda: AlexNet(10, width=16),
    "VGG11": lambda: VGG11(10, width=8),
}
FACTORS = (0.5, 1.0, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data", help="folder of CIFAR-10")
    parser.add_argument("--experts", default="experts/cifar10_cpu", help="folder of the experts")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tuned", type=int, default=12, help="the inner length called 1")
    parser.add_argument("--outer-steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", type=int, default=1, help="networks for each architecture")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()

    files = [str(ROOT / "gin" / "cifar10_experts_cpu.gin")]
    bindings = [f"cifar10.root = {options.data!r}", f"Experts.folder = {options.experts!r}"]
    experiment = config.load(files, bindings)
    data = experiment.prepare()
    experts = train_experts(experiment, data)
    # Enough images for the comparison; CIFAR-10's are in random order.
    data = replace(
        data,
        validation_images=data.validation_images[:500],
        validation_labels=data.validation_labels[:500],
        test_images=data.test_images[:2000],
        test_labels=data.test_labels[:2000],
    )

    rows = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    done = {(row["method"], row["inner_steps"], row["seed"]) for row in rows}
    for seed in range(options.seeds):
        for factor in FACTORS:
            steps = max(1, round(factor * options.tuned))
            for method, truncation in (("MTT", Full()), ("ATT", MinimumDistance())):
                if (method, steps, seed) in done:
                    continue
                experiment.distiller.truncation = truncation
                experiment.distiller.inner_steps = steps
                rows.append(
                    {
                        "method": method,
                        "factor": factor,
                        "inner_steps": steps,
                        "seed": seed,
                        **measure(experiment, data, seed, options),
                    }
                )
                write_json(options.json, rows, {**summary(rows), **experts})
        if ("random real", 0, seed) not in done:
            accuracy = judge(experiment, data, seed, options, None)
            rows.append(
                {
                    "method": "random real",
                    "factor": None,
                    "inner_steps": 0,
                    "seed": seed,
                    **accuracy,
                }
            )
    write_json(options.json, rows, {**summary(rows), **experts})
    print(table(mean_rows(rows), COLUMNS))
    draw(rows, options.plot)


def train_experts(experiment: Experiment, data: PreparedData) -> dict[str, float]:
    writer: ExpertWriter = experiment.distiller.objective.experts.train(
        data,
        experiment.network,
        experiment.key.fold("experts"),
        experiment.describe(data),
        StopRequest(),
    )
    shards = writer.index["shards"]
    return {
        "experts": float(len(shards)),
        "experts_validation_accuracy": statistics.fmean(
            shard["validation_accuracy"] for shard in shards
        ),
    }


def measure(experiment: Experiment, data: PreparedData, seed: int, options: Any) -> dict[str, Any]:
    """Distil once and judge the result."""
    distiller = experiment.distiller
    distiller.outer_steps = options.outer_steps
    distiller.validate_every, distiller.average_decay = 0, None
    began = time.process_time()
    run = distillation(experiment, data, seed)
    steps = [event for event in outer_loop(run) if isinstance(event, Stepped)]
    found: dict[str, Any] = {
        "cpu_seconds": time.process_time() - began,
        "matching_loss": statistics.fmean(float(step.result.loss) for step in steps[-10:]),
        "rate": steps[-1].metrics["rate"],
        "nearest_steps": [step.result.window.stop for step in steps],
    }
    excess = [step.objective.get("matching/excess_at_fixed_length") for step in steps]
    if None not in excess:
        found["excess_at_fixed_length"] = excess
        found["fraction_mismatched"] = statistics.fmean(value > 0.05 for value in excess)
    return {**found, **judge(experiment, data, seed, options, run.candidate("images"))}


def judge(
    experiment: Experiment, data: PreparedData, seed: int, options: Any, found: DistilledSet | None
) -> dict[str, Any]:
    """Test accuracy in % on every architecture."""
    evaluator = Evaluator(
        networks=options.networks, steps=[150], augmentation=experiment.augmentation
    )
    key = Key(seed).fold("evaluation")
    accuracy = {}
    for name, make in ARCHITECTURES.items():
        if found is None:
            result = evaluator.random_real(1, make(), data, key)
        else:
            result = evaluator.distilled(found.images, found.labels, make(), data, key)
        accuracy[name] = 100 * result.mean
    return accuracy


COLUMNS = {
    "method": "",
    "inner_steps": "d",
    **dict.fromkeys(ARCHITECTURES, ""),
    "nearest": ".1f",
    "mismatched": ".2f",
}


def groups(rows: list[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["method"], row["inner_steps"]), []).append(row)
    return found


def mean_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean ± standard deviation over seeds."""
    result = []
    for (method, steps), group in sorted(groups(rows).items()):
        cells: dict[str, Any] = {"method": method, "inner_steps": steps}
        for name in ARCHITECTURES:
            values = [row[name] for row in group]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells[name] = f"{statistics.fmean(values):.1f} ± {spread:.1f}"
        late = [stop for row in group for stop in row.get("nearest_steps", [])[-20:]]
        missed = [row["fraction_mismatched"] for row in group if "fraction_mismatched" in row]
        cells["nearest"] = statistics.fmean(late) if late else None
        cells["mismatched"] = statistics.fmean(missed) if missed else None
        result.append(cells)
    return result


def summary(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    return {
        f"{method}_{steps}_{name}": statistics.fmean(row[name] for row in group)
        for (method, steps), group in groups(rows).items()
        for name in ARCHITECTURES
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against the inner length, and the nearest step over time."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    grouped = groups(rows)
    for method, marker in (("MTT", "s"), ("ATT", "o")):
        lengths = sorted(steps for name, steps in grouped if name == method)
        values = [[row["ConvNet"] for row in grouped[method, steps]] for steps in lengths]
        left.errorbar(
            lengths,
            [statistics.fmean(group) for group in values],
            [statistics.stdev(group) if len(group) > 1 else 0.0 for group in values],
            marker=marker,
            capsize=4,
            label=method,
        )
    left.set(xlabel="inner steps N_S", ylabel="ConvNet test accuracy, %")
    left.legend()
    for steps in sorted(steps for name, steps in grouped if name == "ATT"):
        runs = [row["nearest_steps"] for row in grouped["ATT", steps]]
        means = [statistics.fmean(column) for column in zip(*runs, strict=True)]
        right.plot(range(1, len(means) + 1), means, label=f"N_S = {steps}")
    right.set(xlabel="outer step", ylabel="ATT: nearest step N_opt, mean over seeds")
    right.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
