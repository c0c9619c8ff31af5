"""A run that is killed at random moments ends with the bits of one that was not.

One distillation is left alone. The same one is killed (SIGKILL) again and again and resumed by the
same command. Where it is killed is drawn: when its checkpoint has come to a random outer step, up
to --after seconds later, so also while it starts, writes or judges. At the end every tensor of the
distilled set and of the checkpoint, the optimizer's state among them, is compared bit for bit.

    python benchmarks/kills.py --data FOLDER --json results.json
    # digits, which need no data
    python benchmarks/kills.py --kills 50 --steps 200 --json results.json

The network is narrow and the runs are short, for what is asked is not how good the set is.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from common import table, write_json

ROOT = Path(__file__).parents[1]
FILES = ("distilled.safetensors", "checkpoint.safetensors")
CHECKPOINT = FILES[1]
SETTINGS = """
Distiller.minutes = None
Distiller.snapshot_minutes = []
Distiller.inner_steps = 10
Distiller.compile = False
Distiller.checkpoint_seconds = 0.0
Distiller.validate_every = 50
Distiller.image_every = 100
Distiller.average_decay = 0.9
RandomWindow.window = 5
RandomWindow.refresh = 2
RealImages.real_batch = 100
RealImages.real_micro_batch = 50
ConvNet.width = 16
Evaluator.networks = 1
Evaluator.steps = [20]
Evaluator.validation_networks = 1
Evaluator.validation_steps = 20
Evaluator.full_data_networks = 0
"""
OF_CIFAR = """
Experiment.transform = @standardize
RealImages.precision = None
"""


def words(args: argparse.Namespace, folder: Path) -> list[str]:
    """The arguments of `dd.train`."""
    settings = SETTINGS + f"Distiller.outer_steps = {args.steps}\n"
    recipe = "digits.gin"
    if args.data is not None:
        recipe = "cifar10_cpu.gin"
        settings += OF_CIFAR + f"cifar10.root = {str(args.data.resolve())!r}\n"
    given = [f"--gin_param={line}" for line in settings.strip().splitlines()]
    return [f"--gin_file={ROOT / 'gin' / recipe}", f"--run_dir={folder}", *given]


def begin(arguments: list[str], log: Path) -> BaseProcess:
    """The command in a process that has imported all it needs, which spares seconds a start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dd.config", "dd.train", "tensorboard", "matplotlib.pyplot"])
    process = context.Process(target=train, args=(arguments, log))
    process.start()
    return process


def train(arguments: list[str], log: Path) -> None:
    """What such a process does."""
    from dd.train import main as command

    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(command(arguments))


def saved_step(folder: Path) -> int:
    """The outer step of the checkpoint; −1 before the first."""
    try:
        with (folder / CHECKPOINT).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return int(json.loads(header["__metadata__"]["dd"])["step"])
    except FileNotFoundError:
        return -1


def killed_again_and_again(args: argparse.Namespace, folder: Path, log: Path) -> list[Any]:
    """Kill and resume until all kills are done, then go on to the end; where each kill was."""
    draw = random.Random(args.seed)
    # The end is left out, since a run that is complete cannot be killed.
    places = sorted(draw.randrange(int(0.95 * args.steps)) for _ in range(args.kills))
    rows: list[dict[str, Any]] = []
    for place in places:
        process = begin(words(args, folder), log)
        while saved_step(folder) < place and process.is_alive():
            time.sleep(0.01)
        wait = draw.uniform(0, args.after)
        time.sleep(wait)
        if not process.is_alive():
            raise SystemExit(f"the run ended by itself, with status {process.exitcode}; see {log}")
        process.kill()
        process.join()
        at = saved_step(folder)
        rows.append({"kill": len(rows) + 1, "drawn step": place, "later": wait, "saved step": at})
        print(f"kill {len(rows)} of {args.kills}: checkpoint of outer step {at}", flush=True)
    finish(args, folder, log)
    return rows


def finish(args: argparse.Namespace, folder: Path, log: Path) -> None:
    process = begin(words(args, folder), log)
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"a run ended with status {process.exitcode}; see {log}")


def differences(one: Path, other: Path) -> tuple[int, list[str], dict[str, str]]:
    """How many tensors were compared, which have other bits, and a checksum of each file's."""
    from dd.runtime.cache import checksum
    from dd.runtime.files import read_tensors

    count, different, checksums = 0, [], {}
    for name in FILES:
        mine, theirs = (read_tensors(folder / name)[0] for folder in (one, other))
        count += len(mine)
        for key in sorted(mine.keys() | theirs.keys()):
            pair = mine.get(key), theirs.get(key)
            if None in pair or checksum([pair[0]]) != checksum([pair[1]]):  # type: ignore[list-item]
                different.append(f"{name}: {key}")
        checksums[name] = checksum(part for key in sorted(mine) for part in (key, mine[key]))
    return count, different, checksums


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10; default: digits")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600, help="outer steps")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--after", type=float, default=1.0, help="most seconds until a kill")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["DD_CACHE"] = f"{scratch}/cache"
        alone, killed, log = (Path(scratch) / name for name in ("alone", "killed", "log"))
        try:
            began = time.perf_counter()
            finish(args, alone, log)
            seconds = time.perf_counter() - began
            rows = killed_again_and_again(args, killed, log)
        except SystemExit:
            print(log.read_text(), file=sys.stderr)
            raise
        count, different, checksums = differences(alone, killed)
        tracebacks = log.read_text().count("Traceback")
    print(table(rows, {"kill": "d", "drawn step": "d", "later": ".2f", "saved step": "d"}))
    print(f"{len(rows)} kills, {count} tensors compared, {len(different)} with other bits")
    summary: dict[str, Any] = {
        "data": "digits" if args.data is None else "CIFAR-10",
        "outer_steps": args.steps,
        "kills": len(rows),
        "tensors_compared": count,
        "tensors_with_other_bits": different,
        "tracebacks": tracebacks,
        "sha256": checksums,
        "seconds_of_the_run_left_alone": round(seconds, 1),
    }
    write_json(args.json, rows, summary)
    sys.exit(bool(different) or tracebacks > 0)


if __name__ == "__main__":
    main()
