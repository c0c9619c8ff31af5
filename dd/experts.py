"""Train expert networks: `python -m dd.experts --gin_file=…`."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dd.cli import INTERRUPTED, add_gin_arguments, fail, keep_tracebacks_in, parsed, run

EPILOG = """\
examples:
  python -m dd.experts --gin_file=gin/cifar10_att_cpu.gin
  python -m dd.experts --gin_file=gin/cifar10_att_cpu.gin --gin_param='Experts.count = 4'
  python -m dd.experts --gin_file=gin/att/cifar10_1.gin \\
      --gin_param="Experts.storage = 'bfloat16'"
  python -m dd.experts --gin_file=gin/tiny_imagenet_psp_cpu.gin \\
      --gin_param='PrototypeAlignment.experts = @Experts()' \\
      --gin_param="Experts.folder = 'runs/experts'" --gin_param='Experts.count = 1'

The same file then goes to python -m dd.train. Ctrl-C stops after the current snapshot; the same
command goes on with the expert that was stopped.
"""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dd.experts",
        description="Train networks on the real images and keep their trajectories, which "
        "trajectory matching (MTT, ATT) distils from, and on whose features an alignment may look.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_gin_arguments(parser, required=True)
    options = parsed(parser, arguments)
    return run(lambda: _train(options))


def _train(options: argparse.Namespace) -> int:
    from bilevel import BilevelError
    from dd import config
    from dd.runtime.files import DamagedFileError
    from dd.runtime.stopping import stop_on_signal
    from dd.runtime.writer import only_writer

    try:
        experiment = config.load(options.gin_file, options.gin_param, modules=options.modules)
        experts = experiment.distiller.objective.experts
        if experts is None:
            return fail(
                "this configuration has no use for experts: set "
                "Distiller.objective = @MatchExperts(), as gin/cifar10_att_cpu.gin does, or "
                "PrototypeAlignment.experts = @Experts()"
            )
        keep_tracebacks_in(experts.folder)
        print(f"preparing {experiment.dataset!r}", flush=True)
        data = experiment.prepare()
        print(f"writing to {experts.folder}", flush=True)
        with only_writer(experts.folder), stop_on_signal() as stop:
            writer = experts.train(
                data,
                experiment.network,
                experiment.key.fold("experts"),
                experiment.describe(data),
                stop,
            )
    except (config.ConfigError, BilevelError, DamagedFileError, OSError, ValueError) as error:
        return fail(config.one_line(error))
    if stop.requested:
        print(f"stopped with {len(writer.done)} experts; to go on, repeat the command")
        return INTERRUPTED
    _print(writer.folder, writer.index)
    return 0


def _print(folder: Path, index: Mapping[str, Any]) -> None:
    shards = index["shards"]
    size = sum((folder / shard["file"]).stat().st_size for shard in shards)

    def mean(name: str) -> float:
        return float(sum(shard[name] for shard in shards) / len(shards))

    print(f"\n{len(shards)} experts, {size / 1e6:.1f} MB in {folder}")
    print(f"validation accuracy  {100 * mean('validation_accuracy'):.1f} %")
    print(
        f"stored as {index['training']['storage']}: "
        f"{100 * mean('stored_validation_accuracy'):.1f} %, rounding error "
        f"{mean('storage_error'):.1e} of the distance between snapshots"
    )


if __name__ == "__main__":
    sys.exit(main())
