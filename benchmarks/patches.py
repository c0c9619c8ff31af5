"""What patches and their alignment do, on a few classes of Tiny-ImageNet.

The same number of outer steps for every variant, from the same real images by seed; then the test
accuracy of fresh networks after 150 training steps. No set and no number of steps is chosen.

Variants
    whole                 whole images, the hypergradient clipped as one.
    patches, one clip     4×4 patches, each normalised on its own at the start, clipped as one.
    patches               the same, and each clipped on its own.
    whole, global         whole images, their class prototypes aligned with the real ones.
    patches, global       patches as in the third, with the global prototypes aligned.
    patches, local        the same with the local ones.
    patches, aligned      the same with both.
    …, 0.1                the same with ten times the default weight of the alignment.

    python benchmarks/patches.py --data FOLDER --json results.json

FOLDER holds `wnids.txt` of the classes. Every finished run is written at once; a rerun with the
same --json goes on after the last one.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from common import table, write_json
from distil import ROOT, accuracy, distil

from bilevel.clip import MovingAverageClip, MovingAverageRowClip
from dd import config
from dd.cli import keep_freed_memory
from dd.evaluation.evaluator import Evaluator
from dd.objectives.alignment import PrototypeAlignment

WHOLE = {"patches": 1, "clip": MovingAverageClip}
PATCHES = {"patches": 4, "clip": MovingAverageRowClip}
#: Patches per side, the clip, and what is aligned with which weight.
VARIANTS: dict[str, dict[str, Any]] = {
    "whole": WHOLE,
    "patches, one clip": {**PATCHES, "clip": MovingAverageClip},
    "patches": PATCHES,
    "whole, global": {**WHOLE, "parts": ["global"]},
    "patches, global": {**PATCHES, "parts": ["global"]},
    "patches, local": {**PATCHES, "parts": ["local"]},
    "patches, aligned": {**PATCHES, "parts": ["global", "local"]},
    "patches, aligned, 0.1": {**PATCHES, "parts": ["global", "local"], "weight": 0.1},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of the classes")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--outer-steps", type=int, default=60)
    parser.add_argument("--real-batch", type=int, default=200)
    parser.add_argument("--networks", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()

    rows = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    done = {(row["variant"], row["seed"]) for row in rows}
    for seed in range(options.seeds):
        for variant in options.variants:
            if (variant, seed) not in done:
                found = measure(variant, seed, options)
                rows.append({"variant": variant, "seed": seed, "accuracy": found})
                write_json(options.json, rows, summary(rows))
    write_json(options.json, rows, summary(rows))
    shown = [
        {"variant": variant, "accuracy": f"{mean:.1f} ± {deviation:.1f}"}
        for variant in options.variants
        for mean, deviation in [spread(rows, variant)]
    ]
    print(table(shown, {"variant": "", "accuracy": ""}))


def measure(variant: str, seed: int, options: Any) -> float:
    """Distil once and judge the result."""
    parts = VARIANTS[variant]
    bindings = [
        f"tiny_imagenet.root = {options.data!r}",
        f"SyntheticDataset.patches_per_side = {parts['patches']}",
        f"Distiller.outer_steps = {options.outer_steps}",
        f"RealImages.real_batch = {options.real_batch}",
        "Distiller.minutes = None",
        "Distiller.compile = False",
        "Distiller.image_every = 100000",
    ]
    experiment = config.load([str(ROOT / "gin" / "tiny_imagenet_cpu.gin")], bindings)
    distiller = experiment.distiller
    distiller.clip = parts["clip"](cap=2.0)
    if "parts" in parts:
        alignment = PrototypeAlignment(parts.get("weight", 0.01), parts=parts["parts"])
        distiller.objective.alignment = alignment
    data = experiment.prepare()
    found = distil(experiment, data, seed).candidate("images")
    evaluator = Evaluator(networks=options.networks, steps=[150])
    return accuracy(found, experiment.network, evaluator, data, seed)


def spread(rows: list[dict[str, Any]], variant: str) -> tuple[float, float]:
    """(mean, standard deviation) over seeds in %."""
    values = [100 * row["accuracy"] for row in rows if row["variant"] == variant]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def summary(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    return {variant: spread(rows, variant)[0] for variant in {row["variant"] for row in rows}}


if __name__ == "__main__":
    main()
