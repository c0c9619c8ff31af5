"""What a run found: measured step by step, and written as `results.json`."""

import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, final

import torch
from torch import nn

from dd.data import ImageDataset
from dd.evaluation.accuracy import Accuracy
from dd.evaluation.confusion_picture import confusion_picture
from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.earlier import with_earlier
from dd.evaluation.evaluator import Evaluator
from dd.evaluation.names import TRAINING_SETS
from dd.runtime.cache import checksum
from dd.runtime.devices import device_name
from dd.runtime.files import write_bytes, write_json
from dd.runtime.run_folder import RunFolder
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
        class_names: K names, in the order of `per_class` of an accuracy.
        problems: Why something could not be measured, by what it is.
        data: A checksum of the training data.
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
    class_names: Sequence[str] = ()
    data: str | None = None
    problems: Mapping[str, str] = field(default_factory=dict)
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
            self.of_size(distilled),
            distilled_set={
                "file": file,
                "checksum": checksum([distilled.images, distilled.labels]),
                **distilled.provenance,
            },
        )

    def of_saved_set(self, file: str, distilled: DistilledSet) -> "Report":
        """The same, with the steps that it says led to it, where no run knows them."""
        told = distilled.provenance
        done = told.get("outer_step"), told.get("skipped_steps", 0), told.get("seconds")
        return self.of_set(file, distilled).after(*done)

    def after(self, steps: int | None, skipped: int, seconds: float | None) -> "Report":
        """The report after so many outer steps, of which some were skipped, and seconds of work."""
        return replace(self, outer_steps=steps, skipped_steps=skipped, seconds_distilling=seconds)

    def of_size(self, distilled: DistilledSet) -> "Report":
        """The report with the size of a distilled set."""
        return replace(
            self,
            images_per_class=distilled.images_per_class,
            stored_floats=distilled.stored_floats,
        )

    @property
    def means(self) -> dict[str, float]:
        """The mean accuracy on each training set that was measured."""
        return {name: of.mean for name, of in self.accuracy.items() if of is not None}

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
            **({} if self.data is None else {"data": self.data}),
            "class_names": list(self.class_names),
            "images_per_class": self.images_per_class,
            "stored_floats": self.stored_floats,
            "accuracy": _as_dicts(self.accuracy),
            **({"problems": dict(self.problems)} if self.problems else {}),
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
    dataset: ImageDataset,
    data: str,
    images_per_class: int,
    network: nn.Module,
    evaluator: Evaluator,
    seed: int,
    device: torch.device,
) -> Report:
    """The report of a run before anything was done, with all that describes it.

    Args:
        dataset: Of the run.
        data: A checksum of its training data.
        images_per_class: Of the distilled set.
        network: What is trained.
        evaluator: How.
        seed: Of everything.
        device: Where.
    """
    return Report(
        command=shlex.join(["python", *sys.orig_argv[1:]]),
        dataset=dataset.name,
        data=data,
        class_names=dataset.class_names,
        images_per_class=images_per_class,
        network=type(network).__name__,
        network_parameters=sum(value.numel() for value in network.parameters()),
        protocol=evaluator.protocol.name,
        seed=seed,
        device=device_name(device),
        versions=versions(),
    )


def write_results(
    folder: RunFolder, name: str, report: Report, earlier: Mapping[str, Any] | None = None
) -> None:
    """Write what is known, and a picture of what the set's networks take for what.

    Args:
        folder: Where.
        name: Of the results, such as `results.json`, whose picture is `confusion.png`.
        report: What is known.
        earlier: What was in the file before; its figures of the same set are kept until they are
            measured again.
    """
    content = with_earlier(report.as_dict(), earlier or {})
    folder.write(name, partial(write_json, content=content))
    found = report.accuracy.get("distilled")
    if found is not None and found.confusion is not None:
        drawn = confusion_picture(found.confusion, report.class_names)
        folder.write(confusion_name(name), partial(write_bytes, content=drawn))


def confusion_name(results: str) -> str:
    """What the picture beside a file of results is called."""
    stem = results.removesuffix(".json")
    if stem.startswith("results"):
        return f"confusion{stem.removeprefix('results')}.png"
    return f"{stem}-confusion.png"


def versions() -> dict[str, str]:
    """Of Python, and of the packages that results depend on."""
    packages = ("torch", "torchvision", "torchopt", "numpy")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _as_dicts(accuracies: Mapping[str, Accuracy | None]) -> dict[str, Any]:
    return {name: None if of is None else of.as_dict() for name, of in accuracies.items()}
