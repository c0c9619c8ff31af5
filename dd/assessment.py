"""How good one distilled set is, in every network asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from torch import Tensor, nn

from dd.accuracy import Accuracy
from dd.data.prepared import PreparedData
from dd.distilled_set import DistilledSet
from dd.evaluation import Evaluator
from dd.ranking import augmentation_robust_score, label_robust_score
from dd.results import TRAINING_SETS, write_results

if TYPE_CHECKING:
    from dd.experiment import Experiment


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
