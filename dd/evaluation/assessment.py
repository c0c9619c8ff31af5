"""A set measured beside what one could train on instead."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import final

from torch import Tensor, nn

from bilevel import BilevelError, Key, ProcessError
from bilevel.distributed import world_size
from dd.data.prepared import PreparedData
from dd.evaluation.accuracy import Accuracy
from dd.evaluation.baselines import Baselines
from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.evaluator import Evaluator
from dd.evaluation.names import TRAINING_SETS
from dd.evaluation.report import Report
from dd.evaluation.scores import augmentation_robust_score, label_robust_score
from dd.runtime.plain import duration, one_line

#: In which order training sets are measured.
_ORDER = ("distilled", "random_real", "full_data")


@final
class Assessment:
    """Measures one set beside random real images and the full data.

    The set comes first, and what cannot be measured beside it is told, and costs nothing else.

    Args:
        distilled: The set.
        data: The dataset, by the set's own transform.
        network: What is trained.
        evaluator: How.
        key: The randomness of all networks.
    """

    def __init__(
        self,
        distilled: DistilledSet,
        data: PreparedData,
        network: nn.Module,
        evaluator: Evaluator,
        key: Key,
    ) -> None:
        self._data, self._network, self._evaluator, self._key = data, network, evaluator, key
        self._images = distilled.images.to(data.test_labels.device)
        self._labels = distilled.labels.to(data.test_labels.device)
        self._problems: dict[str, str] = {}
        self._rate = distilled.provenance.get("learning_rate")

    def announcement(self) -> str:
        """What comes now, and about how long it takes."""
        expected = self._evaluator.expected_seconds(
            self._images, self._labels, self._network, self._data, self._key
        )
        parts = (f"{duration(of)} on {name.replace('_', ' ')}" for name, of in expected.items())
        return f"training networks, about {', '.join(parts)}; Ctrl-C keeps set and figures"

    def measured(
        self,
        report: Report,
        training_sets: Sequence[str] = TRAINING_SETS,
        architectures: Mapping[str, nn.Module] | None = None,
        scores: bool = False,
        baselines: Sequence[str] = (),
    ) -> Iterator[Report]:
        """The report after every measurement; the last one is complete.

        Args:
            report: What is known before.
            training_sets: Of `TRAINING_SETS` only these are measured.
            architectures: Further networks to judge the same set by.
            scores: Also measure what DD-Ranking's scores need, and give them.
            baselines: Of `BASELINES`: also choose real images like this, and judge them.
        """
        began, report = time.perf_counter(), replace(report, status="evaluating")

        def now(report: Report) -> Report:
            return replace(report, seconds_evaluating=time.perf_counter() - began)

        # The set's own first, so that nothing beside it can cost its result.
        wanted = sorted(set(training_sets) & set(TRAINING_SETS), key=_ORDER.index)
        for name in wanted:
            with self._told(name):
                found = self._measure(name, self._network, self._evaluator, self._labels)
                report = now(replace(report, accuracy={**report.accuracy, name: found}))
            report = now(replace(report, problems=dict(self._problems)))
            yield report
        for architecture, network in (architectures or {}).items():
            across: dict[str, Accuracy | None] = {}
            for name in wanted:
                if name == "full_data":
                    continue  # that takes longest, and says nothing of the set
                with self._told(f"{name} on {architecture}"):
                    across[name] = self._measure(name, network, self._evaluator, self._labels)
                found_so_far = {**report.architectures, architecture: dict(across)}
                report = replace(report, architectures=found_so_far, problems=dict(self._problems))
                report = now(report)
                yield report
        with self._told("baselines"):
            for name, labels, found in self._baselines().measured(baselines) if baselines else ():
                of_name = {**report.baselines.get(name, {}), labels: found}
                report = now(replace(report, baselines={**report.baselines, name: of_name}))
                yield report
        if scores:
            with self._told("scores"):
                report = replace(report, scores=self._scores())
        yield now(replace(report, status="complete", problems=dict(self._problems)))

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Remember why something beside the set itself could not be measured, and go on.

        Of several processes all must go on alike, so only what all meet is passed over.
        """
        try:
            yield
        except ProcessError:
            raise
        except Exception as error:
            alike = world_size() == 1 or isinstance(error, (ValueError, BilevelError))
            if name == "distilled" or not alike:
                raise
            self._problems[name] = one_line(f"{error}") or type(error).__name__

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

    def _baselines(self) -> Baselines:
        network, evaluator, data = self._network, self._evaluator, self._data
        return Baselines(
            self._images, self._labels, data, network, evaluator, self._key, self._rate
        )

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
