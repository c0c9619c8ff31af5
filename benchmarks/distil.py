"""What the benchmarks that distil share: a run without a command, and the judging of a set."""

from pathlib import Path

from torch import nn

from bilevel import Key
from dd.checkpoint import TrainingState
from dd.data.prepared import PreparedData
from dd.distilled_set import DistilledSet
from dd.evaluation import Evaluator
from dd.experiment import Experiment
from dd.progress import StopRequest

ROOT = Path(__file__).resolve().parent.parent


def distil(experiment: Experiment, data: PreparedData, seed: int, folder: Path) -> TrainingState:
    """Distil once, with the settings of `experiment` but this seed; everything is in `folder`."""
    job = experiment.job(data, folder, seed)
    return experiment.distiller.distil(job, StopRequest(), "", lambda: None)


def accuracy(
    found: DistilledSet, network: nn.Module, evaluator: Evaluator, data: PreparedData, seed: int
) -> float:
    """Mean test accuracy of fresh networks, a fraction."""
    key = Key(seed).fold("evaluation")
    return evaluator.distilled(found.images, found.labels, network, data, key).mean
