"""What a run found: measured step by step, and written as `results.json`."""

import importlib.metadata
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
from dd.evaluation.baselines import Baselines
from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.evaluator import Accuracy, Evaluator
from dd.evaluation.names import TRAINING_SETS
from dd.evaluation.scores import augmentation_robust_score, label_robust_score
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
        images_per_class: Of the distilled set, as networks see it.
        stored_floats: What is stored of it: images, or what they are decoded from, and soft labels.
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
        baselines: On real images that were chosen without distilling, and on the set: by hard
            labels and by soft ones.
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
    stored_floats: int | None = None
    status: str = "running"
    reason: str | None = None
    process: Mapping[str, Any] = field(default_factory=this_process)
    skipped_steps: int = 0
    accuracy: Mapping[str, Accuracy | None] = field(
        default_factory=lambda: dict.fromkeys(TRAINING_SETS)
    )
    architectures: Mapping[str, Mapping[str, Accuracy | None]] = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, Accuracy | None]] = field(default_factory=dict)
    scores: Mapping[str, float] | None = None
    outer_steps: int | None = None
    seconds_distilling: float | None = 0.0
    seconds_evaluating: float = 0.0
    distilled_set: Mapping[str, Any] | None = None

    def of_set(self, file: str, distilled: DistilledSet) -> "Report":
        """The report with what a distilled set says of itself."""
        return replace(
            self.of_size(distilled), distilled_set={"file": file, **distilled.provenance}
        )

    def of_size(self, distilled: DistilledSet) -> "Report":
        """The report with the size of a distilled set."""
        return replace(
            self,
            images_per_class=distilled.images_per_class,
            stored_floats=distilled.stored_floats,
        )

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
            "stored_floats": self.stored_floats,
            "accuracy": _as_dicts(self.accuracy),
            "network": self.network,
            "network_parameters": self.network_parameters,
            "architectures": {name: _as_dicts(of) for name, of in self.architectures.items()},
            "baselines": {name: _as_dicts(of) for name, of in self.baselines.items()},
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
        for name, labels, found in self._baselines().measured(baselines) if baselines else ():
            of_name = {**report.baselines.get(name, {}), labels: found}
            report = now(replace(report, baselines={**report.baselines, name: of_name}))
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


def versions() -> dict[str, str]:
    """Of Python, and of the packages that results depend on."""
    packages = ("torch", "torchvision", "torchopt", "numpy")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _as_dicts(accuracies: Mapping[str, Accuracy | None]) -> dict[str, Any]:
    return {name: None if of is None else of.as_dict() for name, of in accuracies.items()}
