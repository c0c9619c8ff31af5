"""Distil a dataset: `python -m dd.train --gin_file=gin/digits.gin`."""

import argparse
import sys
from datetime import datetime
from pathlib import Path

from bilevel import BilevelError
from bilevel.distributed import gather
from dd import config
from dd.cli import INTERRUPTED, add_gin_arguments, fail, keep_freed_memory, print_results, run
from dd.distillation.loop import CHECKPOINT, DISTILLED, PICTURE
from dd.evaluation.report import RESULTS
from dd.experiment import CONFIG, Experiment
from dd.runtime.files import DamagedFileError
from dd.runtime.processes import one_first
from dd.runtime.stopping import stop_on_signal

#: Parameters that may change when a run is resumed: how long it goes on, how it is judged, and
#: where cached files are.
RESUMABLE = (
    "Distiller.outer_steps",
    "Distiller.minutes",
    "Distiller.snapshot_minutes",
    "Distiller.image_every",
    "Evaluator.networks",
    "Evaluator.steps",
    "Evaluator.full_data_networks",
    "Evaluator.full_data_steps",
    "kip_whitening.cache_folder",
    "zca_whitening.cache_folder",
    "tiny_imagenet.cache_folder",
    "imagenet.cache_folder",
)

EPILOG = """\
examples:
  python -m dd.train --gin_file=gin/digits.gin
  python -m dd.train --gin_file=gin/cifar10_cpu.gin --run_dir=runs/cpu
  python -m dd.train --gin_file=gin/cifar10_rat.gin --gin_param='RandomWindow.window = 40'
  python -m dd.train --gin_file=gin/digits.gin --gin_param='Distiller.truncation = @Full()'
  torchrun --nproc_per_node=4 -m dd.train --gin_file=gin/cifar10_rat.gin --run_dir=runs/rat

The run directory then holds
  config.gin              every parameter in use
  events/                 for tensorboard --logdir RUN_DIR
  distilled.safetensors   the distilled images and labels with their pixel transform
  distilled.png           a picture of them, each stretched to the full range
  checkpoint.safetensors  from which the same command with the same --run_dir goes on
  results.json            accuracy of the distilled set, of random real images, of full data

Ctrl-C stops after the current step and leaves all of that valid.
"""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dd.train",
        description="Distil a dataset into a few images per class, then evaluate them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_gin_arguments(parser, required=True)
    parser.add_argument(
        "--run_dir",
        metavar="DIR",
        help="where everything is written; one that holds a checkpoint is resumed "
        "(default: a new one below runs/)",
    )
    options = parser.parse_args(arguments)
    keep_freed_memory()
    try:
        with one_first():
            experiment = config.load(options.gin_file, options.gin_param)
    except config.ConfigError as error:
        return fail(str(error))
    started = datetime.now().strftime("%Y%m%d-%H%M%S")
    default = f"runs/{Path(options.gin_file[0]).stem}-{started}"
    folder = Path(gather(options.run_dir or default)[0])
    return _run(experiment, folder)


def _run(experiment: Experiment, folder: Path) -> int:
    for name in config.unused():
        print(f"note: {name} is set, but nothing refers to {name.rsplit('.', 1)[0]}")
    print(f"preparing {experiment.dataset!r}", flush=True)
    try:
        with one_first():  # The others find the whitening that it fitted.
            data = experiment.prepare()
    except (ValueError, BilevelError) as error:
        return fail(config.one_line(error))
    text = config.text()
    try:
        if (folder / CHECKPOINT).exists():
            differences = config.differences((folder / CONFIG).read_text("utf-8"), text, RESUMABLE)
            if differences:
                return fail(
                    f"{folder} holds a run with another configuration ({'; '.join(differences)}): "
                    "choose another --run_dir, or repeat the command that started it"
                )
            print(f"resuming the run in {folder}")
    except OSError as error:
        return fail(f"--run_dir={folder} cannot be used: {error}")
    print(f"writing to {folder} (watch it: tensorboard --logdir {folder})", flush=True)
    try:
        with stop_on_signal() as stop:
            results = experiment.train(data, folder, stop, text)
    except (BilevelError, DamagedFileError, OSError) as error:
        return fail(str(error))
    if results["status"] == "interrupted":
        done = results["outer_steps"]
        print(
            ("stopped at once" if done is None else f"stopped after outer step {done}")
            + f"; to go on, repeat the command with --run_dir={folder}"
        )
        return INTERRUPTED
    print_results(results)
    print(
        f"\ndistilled set: {folder / DISTILLED}\npicture:       {folder / PICTURE}"
        f"\nresults:       {folder / RESULTS}"
    )
    return 0


def command() -> int:
    """The command as the shell calls it, by `dd-train` or `python -m dd.train`."""
    return run(main)


if __name__ == "__main__":
    sys.exit(command())
