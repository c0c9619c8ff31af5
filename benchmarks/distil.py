"""What the benchmarks that distil share: a run without a command, and the judging of a set."""

from pathlib import Path

from torch import nn

from bilevel import Key
from dd.data.prepared import PreparedData
from dd.distillation.state import TrainingState
from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.evaluator import Evaluator
from dd.experiment import Experiment
from dd.runtime.stopping import StopRequest

ROOT = Path(__file__).resolve().parent.parent


class StopAfter(StopRequest):
    """As if Ctrl-C came after some outer steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._left = steps

    @property
    def requested(self) -> bool:
        self._left -= 1
        return self._left < 0


def distil(
    experiment: Experiment,
    data: PreparedData,
    seed: int,
    folder: Path,
    stop: StopRequest | None = None,
) -> TrainingState:
    """Distil, with the settings of `experiment` but this seed; everything is in `folder`.

    Goes on from what is there, as far as `stop` lets it.
    """
    job = experiment.task(data, folder, seed)
    return experiment.distiller.distil(job, stop or StopRequest(), "", lambda: None)


def accuracy(
    found: DistilledSet, network: nn.Module, evaluator: Evaluator, data: PreparedData, seed: int
) -> float:
    """Mean test accuracy of fresh networks, a fraction."""
    key = Key(seed).fold("evaluation")
    return evaluator.distilled(found.images, found.labels, network, data, key).mean
