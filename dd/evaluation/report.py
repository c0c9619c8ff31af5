"""How good one distilled set is, in every network asked for."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from torch import Tensor, nn

from bilevel.distributed import rank
from dd.data.prepared import PreparedData
from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.evaluator import Accuracy, Evaluator
from dd.runtime.devices import device_name
from dd.runtime.files import write_json

if TYPE_CHECKING:
    from dd.experiment import Experiment


RESULTS = "results.json"
#: What networks are trained on, in the order of the table.
TRAINING_SETS = ("random_real", "distilled", "full_data")


@final
class Assessment:
    """Measures one set beside random real images and the full data, and keeps results up to date.

    Args:
        experiment: Whose network, evaluator, seed and device are used.
        distilled: The set.
        data: The dataset, by the set's own transform.
        results: What is known so far; what is found joins it.
        path: Where the results are written after every measurement.
    """

    def __init__(
        self,
        experiment: Experiment,
        distilled: DistilledSet,
        data: PreparedData,
        results: dict[str, Any],
        path: Path,
    ) -> None:
        self._network, self._evaluator = experiment.network, experiment.evaluator
        self._key = experiment.key.fold("evaluation")
        self._data, self._results, self._path = data, results, path
        self._images = distilled.images.to(experiment.device)
        self._labels = distilled.labels.to(experiment.device)
        self._rate = distilled.provenance.get("learning_rate")
        self._began = time.perf_counter()

    def run(
        self,
        training_sets: Sequence[str] = TRAINING_SETS,
        architectures: Mapping[str, nn.Module] | None = None,
        scores: bool = False,
    ) -> dict[str, Any]:
        """Measure; the arguments are those of `Experiment.evaluate`. Returns the results."""
        results = self._results
        for name in TRAINING_SETS:
            if name in training_sets:
                accuracy = self._measure(name, self._network, self._evaluator, self._labels)
                results["accuracy"][name] = None if accuracy is None else accuracy.as_dict()
                self._write("evaluating")
        for architecture, network in (architectures or {}).items():
            results["architectures"][architecture] = across = {}
            for name in TRAINING_SETS[:2]:
                if name in training_sets:
                    accuracy = self._measure(name, network, self._evaluator, self._labels)
                    across[name] = None if accuracy is None else accuracy.as_dict()
                    self._write("evaluating")
        if scores:
            results["scores"] = self._scores()
        self._write("complete")
        return results

    def _measure(
        self, name: str, network: nn.Module, evaluator: Evaluator, labels: Tensor
    ) -> Accuracy | None:
        if name == "random_real":
            per_class = len(self._images) // self._data.num_classes
            return evaluator.random_real(per_class, network, self._data, self._key)
        if name == "distilled":
            return evaluator.distilled(
                self._images, labels, network, self._data, self._key, self._rate
            )
        return evaluator.full_data(network, self._data, self._key)

    def _scores(self) -> dict[str, float]:
        """DD-Ranking's scores of the set, from accuracies measured here, with the same networks."""
        labels = self._labels
        hard = labels.argmax(dim=1) if labels.is_floating_point() else labels
        plain = self._evaluator.without_augmentation()

        def mean(name: str, evaluator: Evaluator, labels: Tensor = labels) -> float:
            accuracy = self._measure(name, self._network, evaluator, labels)
            assert accuracy is not None, "full_data_networks was checked"
            return accuracy.mean

        distilled, random_real = (mean(n, self._evaluator) for n in ("distilled", "random_real"))
        real = mean("full_data", self._evaluator)
        of_hard = mean("distilled", self._evaluator, hard) if hard is not labels else distilled
        return {
            "label_robust": label_robust_score(real, of_hard, distilled, random_real),
            "augmentation_robust": augmentation_robust_score(
                distilled, random_real, mean("distilled", plain), mean("random_real", plain)
            ),
        }

    def _write(self, status: str) -> None:
        self._results["status"] = status
        self._results["wall_clock_seconds"]["evaluating"] = time.perf_counter() - self._began
        write_results(self._path, self._results)


def empty_results(experiment: Experiment) -> dict[str, Any]:
    """The results of an experiment before anything was done, with all that describes it."""
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "status": "running",
        "dataset": experiment.dataset.name,
        "images_per_class": experiment.synthetic.images_per_class,
        "accuracy": dict.fromkeys(TRAINING_SETS),
        "network": type(experiment.network).__name__,
        # Tells widths apart: a set may be judged by another than it was distilled with.
        "network_parameters": sum(value.numel() for value in experiment.network.parameters()),
        "architectures": {},
        "scores": None,
        "protocol": experiment.evaluator.protocol.name,
        "selection": "validation split of the training data; test set used once",
        "seed": experiment.seed,
        "outer_steps": None,
        "wall_clock_seconds": {"distilling": 0.0, "evaluating": 0.0},
        "device": device_name(experiment.device),
        "versions": versions(),
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results; of several processes the first one does."""
    if rank() == 0:
        write_json(path, results)


def versions() -> dict[str, str]:
    """Of Python, and of the packages that results depend on."""
    packages = ("torch", "torchvision", "torchopt", "numpy")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def label_robust_score(
    real_hard: float,
    distilled_hard: float,
    distilled: float,
    random_real: float,
    weight: float = 0.5,
) -> float:
    """The share that is not owed to soft labels, (e^α − e^−1) / (e − e^−1), in [0, 1].

        α = w·IOR − (1 − w)·HLR
        HLR = acc(real, hard) − acc(distilled, hard)            what hard labels lose
        IOR = acc(distilled, any label) − acc(random real, any label)    what distilling gains

    Args:
        real_hard: Accuracy, a fraction, of networks trained on all real images.
        distilled_hard: On the distilled images with hard labels.
        distilled: On the distilled images with their own labels.
        random_real: On as many random real images.
        weight: w in [0, 1].

    Raises:
        ValueError: An accuracy is not a fraction, or the weight is outside [0, 1].

    Source: DD-Ranking (package `ddranking`).
    """
    _check(real_hard, distilled_hard, distilled, random_real, weight)
    hard_label_recovery = real_hard - distilled_hard
    improvement_over_random = distilled - random_real
    return _score(weight * improvement_over_random - (1 - weight) * hard_label_recovery)


def augmentation_robust_score(
    distilled: float,
    random_real: float,
    distilled_plain: float,
    random_real_plain: float,
    weight: float = 0.5,
) -> float:
    """The gain over random images with augmentation and without, on the same scale.

        β = w·(gain with augmentation) + (1 − w)·(gain without)

    Args:
        distilled: Accuracy, a fraction, on the distilled set with augmentation.
        random_real: On as many random real images with augmentation.
        distilled_plain: On the distilled set without augmentation.
        random_real_plain: On as many random real images without augmentation.
        weight: w in [0, 1].

    Raises:
        ValueError: An accuracy is not a fraction, or the weight is outside [0, 1].

    Source: DD-Ranking (package `ddranking`).
    """
    _check(distilled, random_real, distilled_plain, random_real_plain, weight)
    with_augmentation, without = distilled - random_real, distilled_plain - random_real_plain
    return _score(weight * with_augmentation + (1 - weight) * without)


def _score(exponent: float) -> float:
    return (math.exp(exponent) - math.exp(-1)) / (math.e - math.exp(-1))


def _check(*fractions: float) -> None:
    for value in fractions:
        if not 0 <= value <= 1:
            raise ValueError(f"{value}: accuracies and the weight are fractions in [0, 1]")
