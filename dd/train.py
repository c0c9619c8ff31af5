"""Distil a dataset: `python -m dd.train --gin_file=gin/digits.gin`."""

import argparse
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dd.cli import (
    FAILED,
    INTERRUPTED,
    add_gin_arguments,
    fail,
    keep_tracebacks_in,
    parsed,
    print_results,
    run,
    say,
)

if TYPE_CHECKING:
    from dd.data.prepared import PreparedData
    from dd.experiment import Experiment

EPILOG = """\
examples:
  python -m dd.train --gin_file=gin/digits.gin
  python -m dd.train --gin_file=gin/cifar10_cpu.gin --run_dir=runs/cpu
  python -m dd.train --gin_file=gin/cifar10_rat.gin --gin_param='RandomWindow.window = 40'
  python -m dd.train --gin_file=gin/digits.gin --gin_param='Distiller.truncation = @Full()'
  python -m dd.train --gin_file=gin/cifar10.gin --dry_run
  torchrun --standalone --nproc_per_node=4 -m dd.train \\
      --gin_file=gin/cifar10_rat.gin --run_dir=runs/rat

The run directory then holds
  config.gin              every parameter in use
  events/                 for tensorboard --logdir RUN_DIR
  distilled.safetensors   the distilled images and labels with their pixel transform
  distilled.png           a picture of them, each stretched to the full range
  checkpoint.safetensors  from which the same command with the same --run_dir goes on
  results.json            accuracy of the distilled set, of random real images, of full data
  confusion.png           what networks trained on the distilled set take for what

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
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="build everything and take an outer step, write nothing, and tell what time and "
        "memory to expect",
    )
    options = parsed(parser, arguments)
    return run(lambda: _train(options))


def _train(options: argparse.Namespace) -> int:
    from bilevel import BilevelError
    from dd import config
    from dd.runtime.processes import from_first_process, one_first
    from dd.runtime.writer import FolderInUseError, only_writer

    try:
        with one_first():
            experiment = config.load(options.gin_file, options.gin_param, modules=options.modules)
            notes = config.warnings_of_unused()
    except config.ConfigError as error:
        return fail(str(error))
    started = datetime.now().strftime("%Y%m%d-%H%M%S")
    default = f"runs/{Path(options.gin_file[0]).stem}-{started}"
    folder = Path(from_first_process(options.run_dir or default))
    if str(folder).encode(errors="ignore").decode() != str(folder):
        return fail(f"--run_dir={folder} is no UTF-8: choose another name")
    for note in notes:
        say(note)
    print(f"preparing {experiment.dataset!r}", flush=True)
    say(experiment.dataset.classes_with_counts())
    try:
        with one_first():  # The others find the whitening that it fitted.
            data = experiment.prepare()
    except (ValueError, BilevelError) as error:
        return fail(config.one_line(error))
    for note in experiment.synthetic.notes(data.train_labels, data.class_names):
        say(f"note: {note}")
    advice = _advice(options.gin_file[-1])
    try:
        if options.dry_run:
            return _rehearse(experiment, data, advice)
        with only_writer(folder):
            return _train_in(folder, experiment, data, advice)
    except FolderInUseError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"--run_dir={folder} cannot be used: {error}")


def _advice(gin_file: str) -> str:
    """What to do where a CPU will not finish a run."""
    from dd.gin_text import recipe_for_cpu

    recipe = recipe_for_cpu(gin_file)
    if recipe is None:
        return "Distiller.minutes ends it earlier, and a narrower network makes steps shorter"
    return f"the recipe made for one is --gin_file={recipe}"


def _rehearse(experiment: "Experiment", data: "PreparedData", advice: str) -> int:
    from bilevel import BilevelError

    try:
        for line in experiment.rehearsed(data, advice):
            print(line, flush=True)
    except BilevelError as error:
        return fail(str(error))
    return 0


def _train_in(folder: Path, experiment: "Experiment", data: "PreparedData", advice: str) -> int:
    from bilevel import BilevelError
    from dd import config
    from dd.api.runs import is_resumed
    from dd.distillation.recorder import DISTILLED, PICTURE
    from dd.evaluation.names import RESULTS
    from dd.runtime.files import DamagedFileError
    from dd.runtime.stopping import stop_on_signal

    keep_tracebacks_in(folder)
    text = config.text()
    try:
        if is_resumed(folder, text):
            print(f"resuming the run in {folder}")
    except (config.ConfigError, DamagedFileError) as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"--run_dir={folder} cannot be used: {error}")
    print(f"writing to {folder} (watch it: tensorboard --logdir {folder})", flush=True)
    try:
        with stop_on_signal() as stop:
            report = experiment.train(data, folder, stop, text, advice=advice)
    except (BilevelError, DamagedFileError) as error:
        return fail(str(error))
    except OSError as error:
        return fail(str(error) if error.errno is None or error.filename else f"{folder}: {error}")
    if report.status == "interrupted":
        if any(report.accuracy.values()):
            print_results(report.as_dict())
        done = report.outer_steps
        if report.distilled_set is not None:
            print(
                f"stopped while evaluating; the distilled set is kept: {folder / DISTILLED}\n"
                f"to evaluate it later: dd-evaluate {shlex.quote(str(folder))}"
            )
            return INTERRUPTED
        print(
            ("stopped at once" if done is None else f"stopped after outer step {done}")
            + f"; to go on, repeat the command with --run_dir={folder}"
        )
        return INTERRUPTED
    print_results(report.as_dict())
    if report.told_status == "diverged":
        fail(f"{report.skipped_steps} of {report.outer_steps} outer steps were skipped")
    print(
        f"\ndistilled set: {folder / DISTILLED}\npicture:       {folder / PICTURE}"
        f"\nresults:       {folder / RESULTS}"
    )
    return 0 if report.told_status == "complete" else FAILED


if __name__ == "__main__":
    sys.exit(main())
