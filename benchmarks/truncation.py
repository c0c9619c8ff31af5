"""How concentrated the window of `StageAware` is, on gradient norms recorded while distilling.

A set is distilled with RaT-BPTT, and at a few outer steps full inner runs are recorded. Each
recording is then given to `StageAware` with every way of turning norms into a distribution, and
with every rule for the width; nothing is trained with these.

Columns
    ipc, outer step   Images per class, and how far the set had been distilled.
    normalization     Of `Softmax`, at temperature 1; or `EffectiveSteps`.
    early, late       exp(entropy) of the distribution over all T inner steps (T means uniform, 1
                      means always the same step), in the early and in the late stage: mean over
                      recordings. The shares are the probability of the first tenth of the steps in
                      the early stage, and of the last tenth in the late one; uniform would be 0.10.

The second table is of the width: mean and standard deviation over the windows that are drawn in
the early and in the late stage, each with the default distribution of the position.

    python benchmarks/truncation.py --gin_param="cifar10.root = 'FOLDER'"
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from common import table, write_json
from torch import Tensor

import bilevel
from bilevel.truncation import (
    ByFraction,
    EffectiveSteps,
    Plan,
    Softmax,
    StageAware,
    StepDistribution,
)
from dd import config
from dd.data.prepared import PreparedData, RealBatches
from dd.experiment import Experiment
from dd.objectives.real_images import MetaLoss

GIN = Path(__file__).parents[1] / "gin" / "cifar10_cpu.gin"
WINDOW, WIDTH_RANGE = 20, 5
#: Independent inner runs that are recorded at each outer step.
RECORDINGS = 3
DISTRIBUTIONS: dict[str, StepDistribution] = {
    "none": Softmax("none"),
    "standardize": Softmax("standardize"),
    "log_standardize": Softmax("log_standardize"),
    "EffectiveSteps(0.5)": EffectiveSteps(0.5),
}
#: How far into the run each stage is, for `ByFraction`.
STAGES = {"early": 0.0, "late": 1.0}


class Recording(bilevel.truncation.Truncation):
    """Records a whole run; its window is of no interest."""

    minimum_steps = 1

    def plan(self, steps: int, generator: torch.Generator) -> Plan:
        return Plan(steps, earliest_start=steps - 1, signals=("gradient_norm",))

    def select(self, trace: bilevel.Trace, generator: torch.Generator) -> bilevel.Window:
        return bilevel.Window(trace.horizon - 1, trace.horizon)


def recordings(
    experiment: Experiment, data: PreparedData, inner_steps: int, at: list[int]
) -> dict[int, list[Tensor]]:
    """Gradient norms [T] of `RECORDINGS` inner runs, by the outer step they were recorded at."""
    problem = MetaLoss(
        experiment.network, experiment.synthetic, experiment.augmentation, experiment.device
    )
    outer = experiment.synthetic.create(
        data.train_images,
        data.train_labels,
        data.num_classes,
        experiment.key.generator("synthetic"),
    )
    inner = experiment.distiller.optimizer
    recorder = bilevel.Hypergradient(problem, inner, inner_steps, Recording())
    window = bilevel.truncation.RandomWindow(WINDOW)
    hypergradient = bilevel.Hypergradient(problem, inner, inner_steps, window)
    optimizer = torch.optim.Adam(list(outer.values()), lr=experiment.distiller.image_lr)
    clip = bilevel.clip.MovingAverageClip(cap=2.0)
    real = RealBatches(
        data.train_images, data.train_labels, 256, experiment.augmentation, experiment.key
    )
    found = {}
    for step in range(max(at) + 1):
        batch, key = real.at(step), experiment.key.fold("outer", step)
        if step in at:
            found[step] = [
                recorder(outer, batch, key.generator("recording", index)).trace["gradient_norm"]
                for index in range(RECORDINGS)
            ]
        optimizer.zero_grad()
        hypergradient.backward(outer, batch, key.generator())
        clip(list(outer.values()))
        optimizer.step()
    return found


def effective(probabilities: Tensor) -> float:
    """exp(entropy)."""
    return float(torch.special.entr(probabilities).sum().exp())


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def positions(ipc: int, step: int, norms: list[Tensor]) -> list[dict[str, Any]]:
    """A row for each distribution."""
    rows = []
    for name, distribution in DISTRIBUTIONS.items():
        everywhere = torch.ones(len(norms[0]), dtype=torch.bool)
        early = [distribution(g.double(), everywhere, 1) for g in norms]
        late = [distribution(g.double(), everywhere, -1) for g in norms]
        tenth = len(everywhere) // 10
        rows.append(
            {
                "ipc": ipc,
                "outer step": step,
                "normalization": name,
                "early": mean([effective(p) for p in early]),
                "late": mean([effective(p) for p in late]),
                "early, first tenth": mean([float(p[:tenth].sum()) for p in early]),
                "late, last tenth": mean([float(p[-tenth:].sum()) for p in late]),
            }
        )
    return rows


def widths(ipc: int, step: int, norms: list[Tensor]) -> list[dict[str, Any]]:
    """A row for each rule and stage, from 500 draws for each recording."""
    rows = []
    for rule in ("rank", "exp", "stage"):
        for stage, progress in STAGES.items():
            drawn: list[float] = []
            shown = []
            for g in norms:
                schedule = StageAware(WINDOW, WIDTH_RANGE, ByFraction(), width=rule, refresh=500)
                schedule.update({"progress": progress})
                generator = torch.Generator().manual_seed(0)
                for _ in range(500):
                    trace = bilevel.Trace({"inner_loss": g, "gradient_norm": g})
                    window = schedule.plan(len(g), generator).window
                    drawn.append((window or schedule.select(trace, generator)).width)
                shown.append(float(schedule.report()["effective_windows"]))
            spread = torch.tensor(drawn, dtype=torch.float64)
            rows.append(
                {
                    "ipc": ipc,
                    "outer step": step,
                    "width": rule,
                    "stage": stage,
                    "mean": float(spread.mean()),
                    "std": float(spread.std()),
                    "effective windows": mean(shown),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gin_param", action="append", default=[])
    parser.add_argument("--ipc", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--outer-steps", type=int, nargs="+", default=[0, 20])
    parser.add_argument("--inner-steps", type=int, default=100)
    parser.add_argument("--width", type=int, default=32, help="of the network")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    data: PreparedData | None = None
    where: list[dict[str, Any]] = []
    how_wide: list[dict[str, Any]] = []
    for ipc in options.ipc:
        bindings = [f"ConvNet.width = {options.width}", *options.gin_param]
        experiment = config.load(
            [str(GIN)], [*bindings, f"SyntheticDataset.images_per_class = {ipc}"]
        )
        data = data or experiment.prepare()
        found = recordings(experiment, data, options.inner_steps, options.outer_steps)
        for step, norms in found.items():
            where += positions(ipc, step, norms)
            how_wide += widths(ipc, step, norms)
    keys = {"ipc": "d", "outer step": "d"}
    shares = {"early, first tenth": ".2f", "late, last tenth": ".2f"}
    print(table(where, {**keys, "normalization": "s", "early": ".0f", "late": ".0f", **shares}))
    columns = {"width": "s", "stage": "s", "mean": ".1f", "std": ".1f", "effective windows": ".0f"}
    print("\n" + table(how_wide, {**keys, **columns}))
    if options.json:
        write_json(options.json, where + how_wide, {})


if __name__ == "__main__":
    main()
