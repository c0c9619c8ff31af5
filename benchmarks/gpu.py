"""One report from one GPU: is it right, how fast is it, what memory does it take, what accuracy.

Look at these first. All else runs, with each mix of devices refused and each wait for the device
counted, on one that `tests/pretend_device.py` pretends; these it cannot imitate:

-   Compiled steps and their CUDA graphs: that a replay reads this step's inputs (part 1, compiled).
-   Kernels that differ from the CPU's, and atomic additions in no fixed order: how far a step that
    is run again may be from the first, which is 0 on a CPU (part 1).
-   Streams and pinned memory: with `Experiment.images_on = 'host'` a batch is copied while the
    device computes (part 6, with that setting; the losses must be those of 'device').
-   What is made of the size of the device's memory: iterates and graphs that are kept (parts 2, 5).
-   Allocations in a steady state, and what is said when memory runs out (part 5).
-   TensorFloat-32 and bfloat16 (part 3), and attention and normalisation under them.
-   Several processes: their own devices, and NCCL (`torchrun --nproc_per_node=2 -m dd.train`).

In this order, each part in the report as soon as it is there:

1.  Exactness: hypergradients by `Adjoint` in float32 on the device, eager and compiled, and in
    float64, against autograd through the whole window in float64 on the CPU.
2.  One hypergradient against `higher`, over widths and windows: seconds and peak memory, and so
    their growth with the window.
3.  Precision: seconds of a hypergradient by option, and its cosine to that in float64 from the same
    (θ, s) at the start of the window: the steps before it are chaotic, whatever the precision.
4.  Inner replicas: seconds of R runs one after the other and side by side, and how much their mean
    varies from call to call, √(E‖g − ḡ‖² / ‖ḡ‖²) over 4 calls.
5.  A whole hypergradient by every method, outer loss included: seconds and peak memory.
6.  With --data, a distillation of CIFAR-10 at 10 images per class for --minutes, and its accuracy.

    python benchmarks/gpu.py --report benchmarks/results/gpu.md
    python benchmarks/gpu.py --data DIR --minutes 10 --report benchmarks/results/gpu.md

A part that fails is in the report with its error, and those after it still run; the exit status is
then 1. Without tf32 in its name nothing is rounded to TensorFloat-32. "Compiled" says how many
functions fell back to eager mode, if any did. Allocations: blocks asked of the device in the timed
calls, 0 in a steady state.

`--device cpu --quick` runs all of it in small, to see that it works. A CPU has no peak of memory to
ask for, so there that column is empty; see `benchmarks/hypergradient.py`.
"""

import argparse
import functools
import gc
import json
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from common import command, machine, markdown
from hypergradient import Distillation, adam, higher_window, plain_steps
from recordings import run_again
from torch import Tensor
from torch.nn import functional as F

import bilevel
from dd.augmentation import NoAugmentation
from dd.networks import ConvNet
from dd.objectives.real_images import MetaLoss
from dd.runtime.precision import Precision, allow_tf32
from dd.synthetic.dataset import SyntheticDataset

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = {
    "float32": Precision(),
    "tf32": Precision(),
    "channels last": Precision(channels_last=True),
    "tf32, channels last": Precision(channels_last=True),
    "bfloat16 outer": Precision(outer="bfloat16"),
    "bfloat16 inner and outer": Precision(inner="bfloat16", outer="bfloat16"),
    "bfloat16, channels last": Precision(inner="bfloat16", outer="bfloat16", channels_last=True),
}


#: One and the same, so that its steps are compiled once for each inner loop.
ADJOINT = bilevel.estimators.Adjoint()


def made(problem: bilevel.Problem, burn_in: int, window: int, **options: Any) -> Any:
    return bilevel.Hypergradient(
        problem,
        adam(),
        steps=burn_in + window,
        truncation=bilevel.truncation.Last(window),
        estimator=ADJOINT,
        **options,
    )


def measured(call: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of a call after one to warm up, and what the last and all of them took."""
    call()
    gc.collect()
    allocations = device_allocations(device)
    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else float("nan")
    return {
        "seconds": statistics.median(seconds),
        "MB": peak / 1e6,
        "allocations": device_allocations(device) - allocations,
    }


def device_allocations(device: torch.device) -> float:
    """How many blocks PyTorch has asked of the device so far; NaN where it does not say."""
    if device.type != "cuda":
        return float("nan")
    return float(torch.cuda.memory_stats().get("num_device_alloc", float("nan")))


def mode_of(inner: bilevel.InnerLoop) -> str:
    """Whether its steps are compiled, and how many functions of them could not be."""
    compiler = inner.compiler
    if compiler is None:
        return "eager"
    return f"compiled, {compiler.refused} of it eager" if compiler.refused else "compiled"


def moved(iterate: bilevel.Iterate, device: torch.device, dtype: torch.dtype) -> bilevel.Iterate:
    """The same (θ, Adam state) elsewhere, in another precision."""

    def move(leaf: Tensor) -> Tensor:
        return leaf.to(device, dtype if leaf.is_floating_point() else leaf.dtype)

    return bilevel.Iterate(move(iterate.params), type(iterate.state)(*map(move, iterate.state)))


def through_window(
    inner: bilevel.InnerLoop, recorded: bilevel.Trajectory, outer: Any, batch: Any
) -> Tensor:
    """The hypergradient in the precision of `outer`, from where a recorded window starts."""
    images = outer["images"]
    start = moved(recorded.kept[recorded.window.start], images.device, images.dtype)
    return ADJOINT(run_again(inner, outer, recorded, start), batch).grads["images"]


def shown(megabytes: float, form: str = ".0f") -> str:
    """A figure of memory, or nothing where none could be asked for."""
    return "" if math.isnan(megabytes) else format(megabytes, form)


def exactness(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Relative errors of one hypergradient from one trajectory, that of the float64 run."""
    width, images, window = (8, 10, 3) if quick else (32, 50, 10)
    seed = bilevel.Key(1)
    rows = []
    exact = Distillation(width, images, torch.float64)
    inner = bilevel.InnerLoop(exact, adam())
    # Past Adam's first steps, whose derivative is chaotic in float32.
    trajectory = bilevel.record(inner, exact.images, seed, steps=20 + window, keep_from=20)
    reference = bilevel.estimators.Reverse()(trajectory, exact.real).grads

    for dtype in (torch.float64, torch.float32):
        problem = Distillation(width, images, dtype).to(device)
        for compile in (False, True):
            loop = bilevel.InnerLoop(problem, adam(), compile=compile)
            for hvp in ("reverse", "forward"):
                begun = moved(trajectory.kept[20], device, dtype)
                recorded = run_again(loop, problem.images, trajectory, begun)
                found = bilevel.estimators.Adjoint(hvp)(recorded, problem.real).grads
                error = (found.cpu().double() - reference).norm() / reference.norm()
                if dtype == torch.float64 and not error < 1e-6:
                    raise AssertionError(f"float64 {hvp}, compile={compile}: error {error:.1e}")
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "mode": mode_of(loop),
                        "product": hvp,
                        "relative error": f"{float(error):.1e}",
                    }
                )
    return rows


def against_higher(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Seconds and memory of every way, over widths and windows, with 50 images."""
    burn_in, repeats = (2, 1) if quick else (60, 3)
    rows = []
    for width in (8,) if quick else (64, 128):
        problem = Distillation(width, 50).to(device)
        for window in (2, 4) if quick else (10, 40, 100):

            def higher(problem: Distillation = problem, window: int = window) -> Tensor:
                return higher_window(problem, plain_steps(problem, burn_in), window)

            ways = {"higher": higher}
            made_for = {}
            for name, compile in (("adjoint", False), ("compiled", True)):
                own = made(problem, burn_in, window, compile=compile)

                def ours(own: Any = own, problem: Distillation = problem) -> Tensor:
                    generator = torch.Generator().manual_seed(1)
                    return own(problem.images, problem.real, generator).grads

                ways[name], made_for[name] = ours, own
            base = None
            for name, call in ways.items():
                taken = measured(call, device, repeats)
                base = base or taken
                rows.append(
                    {
                        "width": width,
                        "window": window,
                        "method": name,
                        "mode": mode_of(made_for[name].inner) if name in made_for else "eager",
                        "time / higher": f"{taken['seconds'] / base['seconds']:.2f}",
                        "memory / higher": shown(taken["MB"] / base["MB"], ".3f"),
                        "seconds": f"{taken['seconds']:.2f}",
                        "MB": shown(taken["MB"]),
                        "allocations": shown(taken["allocations"]),
                    }
                )
    return rows


def distilling(
    images_per_class: int,
    width: int,
    real: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    precision: Precision | None = None,
) -> tuple[MetaLoss, dict[str, Tensor], Any]:
    """(problem, outer variables, outer batch) of a distillation, on random images."""
    images = torch.randn(real, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(real) % 10
    synthetic = SyntheticDataset(images_per_class=images_per_class)
    outer = synthetic.create(images, labels, 10, torch.Generator().manual_seed(1))
    network = ConvNet(10, width=width).to(dtype)
    problem = MetaLoss(network, synthetic, NoAugmentation(), device, precision=precision)
    there = {name: value.detach().to(device, dtype) for name, value in outer.items()}
    return problem, there, (images.to(device, dtype), labels.to(device))


def precision(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """CIFAR-10's setting on random images: 10 images per class, on a CPU 1 and half the width."""
    sizes = {
        "quick": (1, 8, 50, 4, 2),
        "cpu": (1, 64, 500, 60, 20),
        "cuda": (10, 128, 5000, 60, 40),
    }
    images_per_class, width, real, steps, window = sizes["quick" if quick else device.type]

    def setting(chosen: Precision, dtype: torch.dtype, compile: bool) -> tuple[Any, Any, Any]:
        problem, outer, batch = distilling(images_per_class, width, real, device, dtype, chosen)
        return made(problem, steps - window, window, compile=compile), outer, batch

    own, outer, batch = setting(Precision(), torch.float64, compile=False)
    recorded = bilevel.record(
        own.inner, outer, bilevel.Key(2), steps=steps, keep_from=steps - window, keep_every=1
    )

    def direction(own: Any, outer: Any, batch: Any) -> Tensor:
        return through_window(own.inner, recorded, outer, batch).flatten().double().cpu()

    reference = direction(own, outer, batch)
    rows = []
    for name, chosen in PRECISIONS.items():
        tf32 = name.startswith("tf32")
        if tf32 and device.type != "cuda":
            continue
        allow_tf32(tf32)
        for compile in (False, True):
            own, outer, batch = setting(chosen, torch.float32, compile)
            generator = torch.Generator().manual_seed(2)
            taken = measured(
                functools.partial(own, outer, batch, generator), device, 1 if quick else 3
            )
            found = direction(own, outer, batch)
            rows.append(
                {
                    "precision": name,
                    "mode": mode_of(own.inner),
                    "seconds": f"{taken['seconds']:.2f}",
                    "MB": shown(taken["MB"]),
                    "cosine to float64": f"{float(F.cosine_similarity(found, reference, 0)):.4f}",
                    "norm / float64": f"{float(found.norm() / reference.norm()):.3f}",
                }
            )
    allow_tf32(False)
    return rows


def replicas(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """R inner runs, eager, at 10 images and 20 differentiated steps of 40."""
    sizes = {
        "quick": ((8,), (1, 2)),
        "cpu": ((16, 64), (1, 2, 4)),
        "cuda": ((32, 128), (1, 2, 4, 8)),
    }
    widths, counts = sizes["quick" if quick else device.type]
    rows = []
    for width in widths:
        problem = Distillation(width, 10).to(device)
        for count in counts:
            after = made(problem, 20, 20, inner_replicas=count)
            beside = made(bilevel.Replicas(problem, count), 20, 20)

            def call(own: Any, seed: int = 1, problem: Distillation = problem) -> Tensor:
                generator = torch.Generator().manual_seed(seed)
                return own(problem.images, problem.real, generator).grads

            taken = [
                measured(functools.partial(call, own), device, 1 if quick else 3)
                for own in (after, beside)
            ]
            draws = torch.stack([call(after, seed) for seed in range(4)]).flatten(1)
            mean = draws.mean(dim=0)
            variance = (draws - mean).square().sum(dim=1).sum() / 3
            rows.append(
                {
                    "width": width,
                    "replicas": count,
                    "one after the other, s": f"{taken[0]['seconds']:.2f}",
                    "side by side, s": f"{taken[1]['seconds']:.2f}",
                    "side by side, MB": shown(taken[1]["MB"]),
                    "spread": f"{float(variance.sqrt() / mean.norm()):.2f}",
                }
            )
    return rows


def methods(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """A hypergradient by every method at the published size of IPC 10; on a CPU in small."""
    sizes = {
        "quick": (1, 8, 50, 6, 2, 1),
        "cpu": (1, 32, 500, 60, 20, 5),
        "cuda": (10, 128, 5000, 200, 60, 10),
    }
    images_per_class, width, real, steps, window, extra = sizes["quick" if quick else device.type]
    problem, outer, batch = distilling(images_per_class, width, real, device)
    truncation, estimators = bilevel.truncation, bilevel.estimators
    transition = truncation.ByFraction()
    cases: dict[str, tuple[Any, Any, bool]] = {
        "BPTT": (truncation.Full(), None, False),
        "T-BPTT": (truncation.Last(window), None, False),
        "RaT-BPTT": (truncation.RandomWindow(window), None, False),
        "RaT-BPTT, compiled": (truncation.RandomWindow(window), None, True),
        "AT-BPTT": (truncation.StageAware(window, extra, transition, refresh=5), None, False),
        "AT-BPTT++": (truncation.WithinTrajectoryPolicy(window, extra), None, False),
        "RaT-BPTT, low rank": (truncation.RandomWindow(window), estimators.LowRank(), False),
    }
    rows = []
    for name, (schedule, estimator, compile) in cases.items():
        # With the default eps_root: the window of BPTT holds Adam's first steps.
        own = bilevel.Hypergradient(
            problem, bilevel.optim.adam(), steps, schedule, estimator=estimator, compile=compile
        )
        generator = torch.Generator().manual_seed(3)
        # An odd number of calls, since windows differ from call to call.
        taken = measured(functools.partial(own, outer, batch, generator), device, 1 if quick else 5)
        rows.append(
            {
                "method": name,
                "mode": mode_of(own.inner),
                "seconds": f"{taken['seconds']:.2f}",
                "MB": shown(taken["MB"]),
                "allocations": shown(taken["allocations"]),
            }
        )
    return rows


def distillation(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """What `dd.train` reaches in `--minutes`, and at snapshots before."""
    folder = args.report.resolve().parent / f"gpu_run_{datetime.now(UTC):%Y%m%d_%H%M%S}"
    snapshots = sorted({round(args.minutes / 4, 2), round(args.minutes / 2, 2)})
    settings = [
        f"cifar10.root = '{Path(args.data).resolve()}'",
        f"Distiller.minutes = {args.minutes}",
        f"Distiller.snapshot_minutes = {snapshots}",
        "Distiller.compile = True",
        "Distiller.validate_every = 0",
        "Distiller.tf32 = True",
        f"Experiment.device = '{device.type}'",
        "Evaluator.full_data_networks = 0",
        "Evaluator.networks = 4",
    ]
    base = [sys.executable, "-m"]
    subprocess.run(
        [
            *base,
            "dd.train",
            f"--gin_file={ROOT / 'gin' / 'cifar10_rat.gin'}",
            f"--run_dir={folder}",
            *(f"--gin_param={setting}" for setting in settings),
        ],
        cwd=ROOT,
        check=True,
    )
    found = {args.minutes: json.loads((folder / "results.json").read_text())}
    for minutes in snapshots:
        at = folder / "snapshots" / f"{minutes:g}_minutes.safetensors"
        out = folder / f"{minutes:g}.json"
        subprocess.run(
            [*base, "dd.evaluate", str(folder), f"--set={at}", "--only=distilled", f"--json={out}"],
            cwd=ROOT,
            check=True,
        )
        found[minutes] = json.loads(out.read_text())
    return [
        {
            "minutes": minutes,
            "outer steps": result["outer_steps"],
            "distilled": _percent(result["accuracy"]["distilled"]),
            "random real": _percent(result["accuracy"]["random_real"]),
        }
        for minutes, result in sorted(found.items())
    ]


#: Name, title and function of every part that needs no data.
PARTS = {
    "exactness": ("Exactness against float64", exactness),
    "higher": ("One hypergradient against higher", against_higher),
    "precision": ("Precision", precision),
    "replicas": ("Inner replicas", replicas),
    "methods": ("A hypergradient by method", methods),
}


def _percent(accuracy: dict[str, Any] | None) -> str:
    if accuracy is None:
        return "–"
    return f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", help="folder with CIFAR-10, for the distillation")
    parser.add_argument("--minutes", type=float, default=10, help="of the distillation")
    parser.add_argument("--quick", action="store_true", help="all of it in small")
    parser.add_argument("--report", type=Path, required=True, help="Markdown; JSON goes beside it")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here; try --device cpu --quick")
    about = machine()
    allow_tf32(False)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        about["device"] = torch.cuda.get_device_name(device)
    args.report.parent.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[dict[str, Any]]] = {}
    failed = False
    plan = {PARTS[name][0]: PARTS[name][1] for name in PARTS if name in args.parts}
    for title in [*plan, *(["CIFAR-10, 10 images per class"] if args.data else [])]:
        try:
            parts[title] = (
                plan[title](device, args.quick) if title in plan else distillation(args, device)
            )
        except Exception as error:  # whatever it is, what else was measured is kept
            traceback.print_exc()
            parts[title] = [{"failed": f"{type(error).__name__}: {error}"}]
            failed = True
        lines = [
            "# Measured on one device",
            "",
            f"    {command()}",
            "",
            " | ".join(f"{k}: {v}" for k, v in about.items()),
        ]
        for name, rows in parts.items():
            lines += ["", f"## {name}", "", markdown(rows)]
        args.report.write_text("\n".join(lines) + "\n")
        args.report.with_suffix(".json").write_text(
            json.dumps({"command": command(), "machine": about, "parts": parts}, indent=2) + "\n"
        )
        print(f"\n{title}\n\n{markdown(parts[title])}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
