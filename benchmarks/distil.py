"""What the benchmarks that distil share: a run without a command, and the judging of a set."""

from pathlib import Path

from torch import nn

from bilevel import Key
from dd.data.prepared import PreparedData
from dd.distillation.loop import Distillation, begin, outer_loop
from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.evaluator import Evaluator
from dd.experiment import Experiment

ROOT = Path(__file__).resolve().parent.parent


def distillation(experiment: Experiment, data: PreparedData, seed: int) -> Distillation:
    """A run with the settings of `experiment`, but this seed, of which nothing is kept on disk."""
    return begin(experiment.distiller, experiment.task(data, None, seed))


def distil(experiment: Experiment, data: PreparedData, seed: int) -> Distillation:
    """The same at its end."""
    run = distillation(experiment, data, seed)
    for _ in outer_loop(run):
        pass
    return run


def accuracy(
    found: DistilledSet, network: nn.Module, evaluator: Evaluator, data: PreparedData, seed: int
) -> float:
    """Mean test accuracy of fresh networks, a fraction."""
    key = Key(seed).fold("evaluation")
    return evaluator.distilled(found.images, found.labels, network, data, key).mean
