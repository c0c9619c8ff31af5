"""What data costs: transforming a batch, fitting whitening, reading from a mapped file.

Images are random bytes. Each figure is the least of several repeats, in processor seconds of this
thread where nothing is waited for, and in seconds where something is.

Rows
    outer loss, evaluation      Forward and backward, and forward alone, of a ConvNet-3 of width 128
                                on 1000 images of 32×32: what transforming as many is compared to.
    standardize, kip whitening  Transforming these 1000 images from uint8.
    fit, from cache             `kip_whitening` of 45,000 images, the first and the second time.
    read on the spot            1500 random images of 64×64 from a mapped file in the page cache.
    read ahead                  How long a step waits for them with `ReadAhead`, if the steps before
                                took 0.2 s: the median.

    python benchmarks/data.py --json benchmarks/results/data_cpu.json
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, table, write_json
from numpy.lib.format import open_memmap

from dd.cli import keep_freed_memory
from dd.data import Standardize, kip_whitening
from dd.data.prepared import ReadAhead
from dd.networks import ConvNet


def least(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """The least seconds of `clock` that a call took."""
    times = []
    for _ in range(repeats):
        began = clock()
        call()
        times.append(clock() - began)
    return min(times)


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def transforms(fitted_on: int, size: int, folder: Path) -> list[dict[str, Any]]:
    """Seconds of fitting, and of transforming a batch beside what is done with it."""
    images = random_bytes(fitted_on, 3, 32, 32)
    fits = [
        least(lambda: kip_whitening(images, cache_folder=folder), 1, time.thread_time)
        for _ in range(2)
    ]
    whitening, standardize = kip_whitening(images, cache_folder=folder), Standardize.fit(images)
    network, batch = ConvNet(10), torch.randn(size, 3, 32, 32)

    def outer_loss() -> None:
        network(batch).square().mean().backward()

    @torch.no_grad()
    def evaluation() -> None:
        network(batch)

    calls = {
        "outer loss": outer_loss,
        "evaluation": evaluation,
        "standardize": lambda: standardize(images[:size]),
        "kip whitening": lambda: whitening(images[:size]),
    }
    seconds = {name: least(call, 3, time.thread_time) for name, call in calls.items()}
    rows = [
        {
            "what": name,
            "seconds": value,
            "/ outer loss": value / seconds["outer loss"],
            "/ evaluation": value / seconds["evaluation"],
        }
        for name, value in seconds.items()
    ]
    for name, value in zip(("fit", "from cache"), fits, strict=True):
        rows.append({"what": name, "seconds": value, "/ outer loss": None, "/ evaluation": None})
    return rows


def reading(count: int, folder: Path) -> list[dict[str, Any]]:
    """Seconds of reading from a mapped file, on the spot and ahead."""
    file = folder / "images.npy"
    written = open_memmap(file, mode="w+", dtype=np.uint8, shape=(count, 3, 64, 64))
    written[:] = random_bytes(1, 3, 64, 64).numpy()
    images = torch.from_numpy(written)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(count, (1500,), generator=generator) for _ in range(12)]
    ahead = ReadAhead(lambda step: batches[step % len(batches)], lambda index: images[index])
    ahead.at(0)
    waits = []
    for step in range(1, 9):
        time.sleep(0.2)
        waits.append(least(lambda step=step: ahead.at(step), 1, time.perf_counter))  # type: ignore[misc]
    on_the_spot = least(lambda: images[batches[0]], 5, time.perf_counter)
    return [
        {"what": name, "seconds": value, "/ outer loss": None, "/ evaluation": None}
        for name, value in (
            ("read on the spot", on_the_spot),
            ("read ahead", statistics.median(waits)),
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="What data costs.")
    parser.add_argument("--fitted-on", type=int, default=45_000, help="images of the fit")
    parser.add_argument("--batch", type=int, default=1000, help="images transformed at a time")
    parser.add_argument("--mapped", type=int, default=100_000, help="images in the mapped file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        rows = transforms(args.fitted_on, args.batch, Path(folder))
        rows += reading(args.mapped, Path(folder))
    print(" | ".join(f"{name}: {value}" for name, value in machine().items()))
    print(table(rows, {"what": "", "seconds": ".4f", "/ outer loss": ".3f", "/ evaluation": ".3f"}))
    if args.json is not None:
        write_json(args.json, rows, {})


if __name__ == "__main__":
    main()
