"""What a run found: measured step by step, and written as `results.json`."""

import importlib.metadata
import math
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel import Key
from dd.data.prepared import PreparedData
from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.evaluator import Accuracy, Evaluator
from dd.evaluation.names import TRAINING_SETS
from dd.runtime.devices import device_name
from dd.runtime.writer import this_process

#: The statuses of a run that a process works on.
AT_WORK = ("running", "evaluating")
#: The share of outer steps that a run may skip and still be called complete.
SKIPPED_AT_MOST = 0.1


@final
@dataclass(frozen=True)
class Report:
    """What is known of a run so far.

    Attributes:
        command: What was run.
        dataset: Its name.
        images_per_class: Of the distilled set.
        network: The class of the network that is trained.
        network_parameters: Tells widths apart: a set may be judged by another than it was
            distilled with.
        protocol: How networks are trained.
        seed: Of everything.
        device: The GPU's model, or "cpu".
        versions: Of Python, and of the packages that results depend on.
        status: "running", "evaluating", "complete", "interrupted", or "failed" with a reason;
            "diverged" is told in place of "complete" where more than a tenth of the outer steps
            were skipped.
        reason: Why it failed.
        process: Which process on which machine is at work; told only while one is.
        skipped_steps: Outer steps that had no finite hypergradient.
        accuracy: On each of `TRAINING_SETS`; None where it was not measured.
        architectures: The same of other networks, by the class's name.
        scores: DD-Ranking's.
        outer_steps: Outer steps that led to the set.
        seconds_distilling: Wall clock spent in them.
        seconds_evaluating: Wall clock spent on the accuracies.
        distilled_set: Its file, and what it says of itself.
    """

    command: str
    dataset: str
    images_per_class: int
    network: str
    network_parameters: int
    protocol: str
    seed: int
    device: str
    versions: Mapping[str, str]
    status: str = "running"
    reason: str | None = None
    process: Mapping[str, Any] = field(default_factory=this_process)
    skipped_steps: int = 0
    accuracy: Mapping[str, Accuracy | None] = field(
        default_factory=lambda: dict.fromkeys(TRAINING_SETS)
    )
    architectures: Mapping[str, Mapping[str, Accuracy | None]] = field(default_factory=dict)
    scores: Mapping[str, float] | None = None
    outer_steps: int | None = None
    seconds_distilling: float | None = 0.0
    seconds_evaluating: float = 0.0
    distilled_set: Mapping[str, Any] | None = None

    def of_set(self, file: str, distilled: DistilledSet) -> "Report":
        """The report with what a distilled set says of itself."""
        return replace(self, distilled_set={"file": file, **distilled.provenance})

    @property
    def told_status(self) -> str:
        """The status; of a run that skipped too many steps, none that says that all is well."""
        diverged = self.skipped_steps > SKIPPED_AT_MOST * (self.outer_steps or 0)
        return "diverged" if self.status == "complete" and diverged else self.status

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {
            "command": self.command,
            "status": self.told_status,
            **({} if self.reason is None else {"reason": self.reason}),
            **({"process": dict(self.process)} if self.status in AT_WORK else {}),
            "dataset": self.dataset,
            "images_per_class": self.images_per_class,
            "accuracy": _as_dicts(self.accuracy),
            "network": self.network,
            "network_parameters": self.network_parameters,
            "architectures": {name: _as_dicts(of) for name, of in self.architectures.items()},
            "scores": None if self.scores is None else dict(self.scores),
            "protocol": self.protocol,
            "selection": "validation split of the training data; test set used once",
            "seed": self.seed,
            "outer_steps": self.outer_steps,
            "skipped_steps": self.skipped_steps,
            "wall_clock_seconds": {
                "distilling": self.seconds_distilling,
                "evaluating": self.seconds_evaluating,
            },
            "device": self.device,
            "versions": dict(self.versions),
        }
        if self.distilled_set is not None:
            found["distilled_set"] = dict(self.distilled_set)
        return found


def new_report(
    dataset: str,
    images_per_class: int,
    network: nn.Module,
    evaluator: Evaluator,
    seed: int,
    device: torch.device,
) -> Report:
    """The report of a run before anything was done, with all that describes it.

    Args:
        dataset: Its name.
        images_per_class: Of the distilled set.
        network: What is trained.
        evaluator: How.
        seed: Of everything.
        device: Where.
    """
    return Report(
        command=shlex.join(["python", *sys.orig_argv[1:]]),
        dataset=dataset,
        images_per_class=images_per_class,
        network=type(network).__name__,
        network_parameters=sum(value.numel() for value in network.parameters()),
        protocol=evaluator.protocol.name,
        seed=seed,
        device=device_name(device),
        versions=versions(),
    )


@final
class Assessment:
    """Measures one set beside random real images and the full data.

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
        self._rate = distilled.provenance.get("learning_rate")

    def measured(
        self,
        report: Report,
        training_sets: Sequence[str] = TRAINING_SETS,
        architectures: Mapping[str, nn.Module] | None = None,
        scores: bool = False,
    ) -> Iterator[Report]:
        """The report after every measurement; the last one is complete.

        Args:
            report: What is known before.
            training_sets: Of `TRAINING_SETS` only these are measured.
            architectures: Further networks to judge the same set by.
            scores: Also measure what DD-Ranking's scores need, and give them.
        """
        began, report = time.perf_counter(), replace(report, status="evaluating")

        def now(report: Report) -> Report:
            return replace(report, seconds_evaluating=time.perf_counter() - began)

        wanted = [name for name in TRAINING_SETS if name in training_sets]
        for name in wanted:
            found = self._measure(name, self._network, self._evaluator, self._labels)
            report = now(replace(report, accuracy={**report.accuracy, name: found}))
            yield report
        for architecture, network in (architectures or {}).items():
            across: dict[str, Accuracy | None] = {}
            for name in wanted:
                if name == "full_data":
                    continue  # that takes longest, and says nothing of the set
                across[name] = self._measure(name, network, self._evaluator, self._labels)
                found_so_far = {**report.architectures, architecture: dict(across)}
                report = now(replace(report, architectures=found_so_far))
                yield report
        if scores:
            report = replace(report, scores=self._scores())
        yield now(replace(report, status="complete"))

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


def versions() -> dict[str, str]:
    """Of Python, and of the packages that results depend on."""
    packages = ("torch", "torchvision", "torchopt", "numpy")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _as_dicts(accuracies: Mapping[str, Accuracy | None]) -> dict[str, Any]:
    return {name: None if of is None else of.as_dict() for name, of in accuracies.items()}


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
        weight: W in [0, 1].

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
        weight: W in [0, 1].

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
