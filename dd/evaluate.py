"""Evaluate a distilled set: `python -m dd.evaluate RUN_DIR`."""

import argparse
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

from dd.cli import add_gin_arguments, fail, keep_tracebacks_in, parsed, print_results, run, say
from dd.evaluation.names import BASELINES, PIXELS, RESULTS, TRAINING_SETS, TRANSFORMED

if TYPE_CHECKING:
    from dd.experiment import Experiment

EPILOG = """\
examples:
  python -m dd.evaluate runs/cpu
  python -m dd.evaluate runs/cpu --set=runs/cpu/snapshots/5_minutes.safetensors --only=distilled
  python -m dd.evaluate runs/cpu --gin_param='Evaluator.networks = 20'
  python -m dd.evaluate runs/cpu --gin_param='Evaluator.protocol = @DCProtocol()'
  python -m dd.evaluate runs/cpu --architectures=ResNet18,VGG11,AlexNet,ViT
  python -m dd.evaluate runs/cpu --baselines=random,herding,k_center,el2n
  python -m dd.evaluate digits-ipc1 --only=distilled
  python -m dd.evaluate runs/cpu --set=theirs.pt --values=transformed
  python -m dd.evaluate runs/mtt --compare=runs/att --plot=mtt_att.png

Every choice is made on the validation split of the training data; the test set is used once.
"""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dd.evaluate",
        description="Train fresh networks on a distilled set, on as many random real images and "
        "on the full data, and compare their test accuracy.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run_dir",
        metavar="RUN_DIR",
        help="what python -m dd.train wrote; or a set that says how it was distilled: its file, "
        "or its name if it comes with dd, such as digits-ipc1",
    )
    parser.add_argument(
        "--set",
        metavar="FILE",
        help="evaluate this set of the run (default: its final one); or a set that others made: "
        "tensors in a .pt file, arrays in an .npz file, or a folder of images",
    )
    parser.add_argument(
        "--values",
        choices=(PIXELS, TRANSFORMED),
        default=PIXELS,
        help="what a .pt or .npz file holds: pixels in [0, 1], to which the run's transform "
        "is applied (default), or already transformed",
    )
    parser.add_argument(
        "--architectures",
        metavar="NAME,…",
        default="",
        help="also judge the set by these networks, such as ResNet18,VGG11,AlexNet,ViT",
    )
    parser.add_argument(
        "--hard_labels", action="store_true", help="replace soft labels by their largest entry"
    )
    parser.add_argument(
        "--baselines",
        metavar="NAME,…",
        default="",
        help=f"also judge real images that are chosen without distilling ({', '.join(BASELINES)}), "
        "with hard labels and with soft ones, and what the set's labels are worth alone",
    )
    parser.add_argument("--scores", action="store_true", help="also give DD-Ranking's two scores")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="RUN_DIR",
        help="do not evaluate: a table for each dataset of what was measured in RUN_DIR and these "
        "runs, or in a file of results",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        default="comparison.png",
        help="the picture that --compare draws (default: comparison.png)",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="where the results go (default: results.json of the run, or a name of its own for "
        "another set, network or protocol, and for what is asked for beside them)",
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=TRAINING_SETS,
        help="train on this only; may be repeated (default: on all of them)",
    )
    add_gin_arguments(parser, required=False)
    options = parsed(parser, arguments)
    if options.compare:
        return run(lambda: _compare(options))
    return run(lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> int:
    from dd import config
    from dd.runtime.changes import WHEN_JUDGED
    from dd.runtime.files import DamagedFileError
    from dd.runtime.processes import one_first
    from dd.runtime.writer import only_writer

    baselines = [name for name in options.baselines.split(",") if name]
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        return fail(f"--baselines={unknown[0]}: there are {', '.join(BASELINES)}")
    try:
        judged = _find(options.run_dir)
    except (config.ConfigError, DamagedFileError, OSError, ValueError) as error:
        return fail(str(error))
    folder, saved = judged.folder, judged.config
    if judged.is_run:
        keep_tracebacks_in(folder)
    chosen = Path(options.set) if options.set else judged.set_path
    if not chosen.exists():
        return fail(
            f"--set={options.set}: there is no such file or folder"
            if options.set
            else f"{folder} holds no {chosen.name}, which python -m dd.train writes"
        )
    try:
        with one_first():
            experiment = config.load(
                options.gin_file,
                options.gin_param,
                modules=options.modules,
                saved=saved,
                name=judged.config_name,
            )
        # What the transform was fitted with is known only in training.
        changed = config.differences(
            saved, f"{saved}\n{config.text()}", config.changeable(WHEN_JUDGED)
        )
        if changed:
            return fail(
                f"the set was distilled with another configuration ({'; '.join(changed)}), so "
                "test images could have been trained on: change only parameters of the Evaluator "
                "and of networks"
            )
        names = [name for name in options.architectures.split(",") if name]
        architectures = {name: config.network(name, experiment) for name in names}
        name = _results_name(options, judged, chosen, experiment, _judged_otherwise(saved))
        results = Path(options.json) if options.json else folder / name
        # Beside a run that goes on, all may be judged but what it writes itself.
        shared = results.resolve() == (folder / RESULTS).resolve()
        with only_writer(folder) if shared else nullcontext():
            report = experiment.evaluate(
                chosen,
                results,
                options.only or TRAINING_SETS,
                values=options.values,
                architectures=architectures,
                hard_labels=options.hard_labels,
                scores=options.scores,
                baselines=baselines,
            )
    except (config.ConfigError, DamagedFileError, OSError, ValueError) as error:
        return fail(str(error))
    print_results(report.as_dict())
    return 0


@final
@dataclass(frozen=True)
class _Judged:
    """A run, or a set that brings its own configuration.

    Attributes:
        folder: Where results go.
        set_path: The file of the set.
        config: How it was distilled.
        config_name: Where that is from.
        is_run: Whether the folder is a run's.
    """

    folder: Path
    set_path: Path
    config: str
    config_name: str
    is_run: bool


def _find(run_dir: str) -> _Judged:
    """What is to be judged: a run's folder, a set's file, or the name of one that comes with dd.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The set does not say how it was distilled.
    """
    from dd.config import saved_text
    from dd.distillation.recorder import DISTILLED
    from dd.evaluation.distilled_set import DistilledSet
    from dd.exchange.shipped import find_set
    from dd.experiment import CONFIG

    folder = Path(run_dir)
    path = folder / CONFIG
    if path.is_file():
        return _Judged(folder, folder / DISTILLED, saved_text(path), str(path), True)
    if folder.is_dir():
        raise FileNotFoundError(f"{folder} is no run directory: it has no {CONFIG}")
    set_path = find_set(run_dir)
    text = DistilledSet.load(set_path).recipe.get("config")
    if not text:
        raise ValueError(
            f"{set_path} does not say how it was distilled; judge it as a set of a run that it "
            "fits: dd-evaluate RUN_DIR --set=FILE"
        )
    return _Judged(Path(), set_path, str(text), f"the recipe of {set_path}", False)


def _results_name(
    options: argparse.Namespace,
    judged: _Judged,
    chosen: Path,
    experiment: "Experiment",
    changes: list[str],
) -> str:
    """`results.json` for the judgement of the run itself, and for each other one its own name.

    It says the set, the network and the protocol if they are not the run's, and what was asked for
    beside them; what else is different makes a checksum at its end.
    """
    from dd.gin_text import parameters
    from dd.runtime.cache import checksum

    # Networks beside the run's own: how they are configured is no change of that.
    others = {*options.architectures.split(",")}
    others -= {parameters(judged.config).get("Experiment.network", "").removeprefix("@")}
    parts, different = [], list(changes)
    is_own = chosen.resolve() == judged.set_path.resolve()
    if not (is_own and judged.is_run):
        parts.append(chosen.stem)
        if not (is_own or chosen.resolve().is_relative_to(judged.folder.resolve())):
            different += [str(chosen.resolve()), options.values]
    if any(_owner(change) not in others for change in changes):
        parts += [type(experiment.network).__name__, experiment.evaluator.protocol.name]
    parts += options.only or []
    parts += ["hard_labels"] if options.hard_labels else []
    for asked in ("architectures", "baselines"):
        names = {name for name in getattr(options, asked).split(",") if name}
        parts += [f"{asked}-{'+'.join(sorted(names))}"] if names else []
    parts += ["scores"] if options.scores else []
    parts += [checksum(different)[:6]] if different else []
    return "-".join([Path(RESULTS).stem, *parts]) + ".json"


def _owner(change: str) -> str:
    """What a parameter belongs to; the text may go on after its name."""
    return change.partition(" ")[0].rpartition("/")[2].rpartition(".")[0]


def _judged_otherwise(saved: str) -> list[str]:
    """How network, protocol and evaluation differ from those of a run's saved configuration.

    How many networks are trained for how long is left out: that is the same, more precisely.
    """
    from dd import config
    from dd.runtime.changes import WHEN_RESUMED

    is_precision = config.changeable(WHEN_RESUMED)

    def says_nothing(name: str) -> bool:
        return is_precision(name) or not (
            config.judges(_owner(name)) or name == "Experiment.network"
        )

    return config.differences(saved, f"{saved}\n{config.text()}", says_nothing)


def _compare(options: argparse.Namespace) -> int:
    from dd.evaluation.comparison import comparison_plot, comparison_table, load_results
    from dd.runtime.files import DamagedFileError, write_bytes

    folders, plot = [options.run_dir, *options.compare], Path(options.plot)
    try:
        runs = load_results([Path(folder) for folder in folders])
    except (DamagedFileError, OSError) as error:
        return fail(str(error))
    say(comparison_table(runs))
    write_bytes(plot, comparison_plot(runs))
    print(f"\npicture: {plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
