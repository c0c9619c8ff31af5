"""Search for good parameters: `python -m dd.sweep --gin_file=… --vary '…'`."""

import argparse
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dd.cli import INTERRUPTED, add_gin_arguments, fail, parsed, run

if TYPE_CHECKING:
    import optuna

    from dd.runtime.stopping import StopRequest
    from dd.search.space import Parameter

EPILOG = """\
examples:
  python -m dd.sweep --gin_file=digits --sweep_dir=runs/rates --trials=20 \\
      --vary 'Distiller.image_lr = log(1e-3, 1)' --vary 'adam.lr = log(1e-3, 1e-2)'
  python -m dd.sweep --gin_file=cifar10_cpu --sweep_dir=runs/forms --trials=12 \\
      --vary 'SyntheticDataset.parameterisation = choice(@Pixels(), @MultiFormation(), @Bases())'
  python -m dd.sweep --gin_file=cifar10_at_cpu --sweep_dir=runs/parts --space=components \\
      --storage=postgresql://host/searches

A line is NAME = log(LOW, HIGH), uniform(LOW, HIGH), integer(LOW, HIGH) or choice(VALUE, …); a space
file has one for each parameter. Every trial is a run directory below --sweep_dir, judged on the
validation split alone, and left early where it falls behind the median of the others.

Ctrl-C stops after the current step. The same command goes on; given several times at once, or on
several machines with one --storage and one --sweep_dir, it shares the trials out.
"""
#: What a sweep leaves beside its trials.
DATABASE, FOUND, PICTURE = "study.db", "sweep.json", "sweep.png"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dd.sweep",
        description="Search over parameters of a gin file with Optuna, by validation accuracy.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_gin_arguments(parser, required=True)
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="'NAME = …'",
        help="a parameter and the values that it may take",
    )
    parser.add_argument(
        "--space",
        action="append",
        default=[],
        metavar="FILE",
        help="a file of such lines; components, stage_thresholds and low_rank come with dd",
    )
    parser.add_argument("--sweep_dir", required=True, metavar="DIR", help="where the trials go")
    parser.add_argument("--trials", type=int, default=30, help="how many in all (default: 30)")
    parser.add_argument(
        "--looks",
        type=int,
        default=4,
        help="judgements of a trial, the last at its end (default: 4)",
    )
    parser.add_argument(
        "--storage",
        metavar="URL",
        help=f"an Optuna database (default: SQLite, {DATABASE} in the folder)",
    )
    options = parsed(parser, arguments)
    return run(lambda: _sweep(options))


def _sweep(options: argparse.Namespace) -> int:
    try:
        import optuna  # noqa: F401
    except ImportError:
        return fail("searching needs Optuna: pip install 'bilevel-dd[sweep]'")
    from bilevel import ConfigurationError
    from bilevel.checks import check_integer
    from bilevel.distributed import world_size
    from dd import config
    from dd.runtime.stopping import stop_on_signal
    from dd.search.space import space
    from dd.search.study import open_study, search
    from dd.search.trial import Stopped

    folder = Path(options.sweep_dir)
    try:
        if world_size() > 1:
            return fail("under torchrun there is no search: start the command several times")
        check_integer("trials", options.trials)
        check_integer("looks", options.looks)
        varied = space(options.space, options.vary)
        config.load(options.gin_file, options.gin_param)
        description = {"configuration": config.text(), "space": [str(each) for each in varied]}
        config.load(options.gin_file, [*options.gin_param, *(each.example for each in varied)])
        folder.mkdir(parents=True, exist_ok=True)
        database = options.storage or f"sqlite:///{(folder / DATABASE).absolute()}"
        study = open_study(database, folder.name, {**description, "looks": options.looks})
    except (config.ConfigError, ConfigurationError, OSError) as error:
        return fail(config.one_line(error))
    with stop_on_signal() as stop:
        objective = partial(_trial, options=options, varied=varied, stop=stop)
        with suppress(Stopped):
            search(study, options.trials, objective, folder, lambda: stop.requested)
    _tell(study, varied, folder)
    if stop.requested:
        print("stopped; to go on, repeat the command")
        return INTERRUPTED
    return 0


def _trial(
    trial: "optuna.Trial",
    folder: Path,
    *,
    options: argparse.Namespace,
    varied: "list[Parameter]",
    stop: "StopRequest",
) -> float:
    import optuna

    from bilevel import BilevelError
    from dd import config
    from dd.runtime.files import DamagedFileError
    from dd.search.study import ERROR, try_again
    from dd.search.trial import Stopped, distil

    bindings = [each.binding(trial) for each in varied]
    print(f"{folder.name}: {'; '.join(bindings)}", flush=True)
    behind = False

    def promising(look: int, accuracy: float) -> bool:
        nonlocal behind
        trial.report(accuracy, look)
        behind = look < options.looks and trial.should_prune()
        return not behind

    try:
        experiment = config.load(options.gin_file, [*options.gin_param, *bindings])
        accuracy = distil(experiment, folder, options.looks, stop, promising)
    except Stopped:
        try_again(trial.study, trial)
        raise
    except (config.ConfigError, BilevelError, DamagedFileError, ValueError) as error:
        # Another one may do better, so the search goes on.
        print(f"{folder.name} failed: {config.one_line(error)}", file=sys.stderr)
        trial.set_user_attr(ERROR, config.one_line(error))
        raise optuna.TrialPruned from error
    if behind:
        raise optuna.TrialPruned
    return accuracy


def _tell(study: "optuna.Study", varied: "list[Parameter]", folder: Path) -> None:
    """Print and write what was found."""
    from dd.runtime.files import write_bytes, write_json
    from dd.search.findings import findings, importances, picture, table

    rows, weights = findings(study), importances(study)
    write_json(folder / FOUND, {"trials": rows, "importances": weights})
    write_bytes(folder / PICTURE, picture(study, varied))
    print(f"\nbest accuracy on the validation split\n\n{table(rows, varied)}")
    if weights:
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in weights.items())
        print(f"\nshare of its variance: {shares}")
    print(f"\npicture: {folder / PICTURE}")
    if rows and rows[0]["status"] == "complete":
        best = folder / rows[0]["trial"]
        print(f"on the test set, once: python -m dd.evaluate {best}")


if __name__ == "__main__":
    sys.exit(main())
