"""One experiment as a gin file describes it: the parts, and what is done with them."""

import importlib.metadata
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

import bilevel
from bilevel.distributed import rank, world_size
from dd.augmentation import Augmentation
from dd.checks import check_callable, check_choice, check_instance, check_integer, check_number
from dd.data import ImageDataset, PixelTransform
from dd.data.prepared import PreparedData, prepare
from dd.distillation import DISTILLED, Job
from dd.distilled_set import DistilledSet
from dd.distiller import Distiller
from dd.evaluation import Accuracy, Evaluator
from dd.expert_buffer import describe
from dd.files import write_json, write_text
from dd.foreign_set import TRANSFORMED, load_foreign_set
from dd.processes import own_cuda_device
from dd.progress import StopRequest
from dd.ranking import augmentation_robust_score, label_robust_score
from dd.synthetic import SyntheticDataset

RESULTS = "results.json"
CONFIG = "config.gin"
#: What networks are trained on, in the order of the table.
TRAINING_SETS = ("random_real", "distilled", "full_data")


@final
class Experiment:
    """Distil a dataset and evaluate the result.

    Args:
        dataset: What to distil.
        transform: A function that fits a pixel transform to training images.
        network: Makes the network from `num_classes`, `channels` and `image_size`.
        augmentation: Of synthetic and real images, while distilling.
        synthetic: The form of the distilled set.
        distiller: The outer loop.
        evaluator: How the set is judged.
        seed: Of everything.
        validation_fraction: Share of the training set held out for every choice that is made.
        device: "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1" … Of several processes each
            has a GPU of its own, so there "cuda:1" is refused.
        images_on: Where the dataset is kept: "device", or "host" if it does not fit there. From
            the host's memory, or memory-mapped files, batches are read ahead.

    Raises:
        ValueError: An argument outside its range.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Callable[[torch.Tensor], PixelTransform],
        network: Callable[..., nn.Module],
        augmentation: Augmentation,
        synthetic: SyntheticDataset,
        distiller: Distiller,
        evaluator: Evaluator,
        seed: int = 0,
        validation_fraction: float = 0.1,
        device: str = "auto",
        images_on: str = "device",
    ) -> None:
        check_instance("dataset", dataset, ImageDataset, "@cifar10() with ()")
        check_callable("transform", transform, "@kip_whitening without ()")
        check_callable("network", network, "@ConvNet without ()")
        check_instance("augmentation", augmentation, Augmentation, "@FlipOrRotate() with ()")
        check_instance("synthetic", synthetic, SyntheticDataset, "@SyntheticDataset() with ()")
        check_instance("distiller", distiller, Distiller, "@Distiller() with ()")
        check_instance("evaluator", evaluator, Evaluator, "@Evaluator() with ()")
        check_integer("seed", seed, 0)
        check_number("validation_fraction", validation_fraction, above=0)
        if validation_fraction >= 1:
            raise ValueError(f"validation_fraction={validation_fraction}: it must be below 1")
        check_choice("images_on", images_on, ("device", "host"))
        self.dataset = dataset
        self.transform = transform
        self.augmentation = augmentation
        self.synthetic = synthetic
        self.distiller = distiller
        self.evaluator = evaluator
        self.seed = seed
        self.validation_fraction = validation_fraction
        self.device = _device(device)
        self.images_on = images_on
        channels, height, width = dataset.image_shape
        if height != width:
            raise ValueError(f"dataset: its images are {height}×{width}; they must be square")
        #: What a network is made for.
        self.image_format = {
            "num_classes": dataset.num_classes,
            "channels": channels,
            "image_size": height,
        }
        self.network = network(**self.image_format)
        if distiller.alignment is not None:
            distiller.alignment.check(self.network, dataset.image_shape, synthetic.patches_per_side)
        # On the CPU, so that a seed means the same on every device.
        self.key = bilevel.Key(seed)

    def prepare(self, transform: PixelTransform | None = None) -> PreparedData:
        """Split the dataset and transform it, by a given transform or by a newly fitted one."""
        fit = self.transform if transform is None else transform
        try:
            return prepare(
                self.dataset, fit, self.validation_fraction, self.seed, self.device, self.images_on
            )
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"the dataset cannot be prepared with validation_fraction="
                f"{self.validation_fraction} and this transform: {error}"
            ) from error

    def describe(self, data: PreparedData) -> dict[str, Any]:
        """What expert networks must agree with this experiment in."""
        return describe(
            self.network,
            data.transform,
            self.dataset.name,
            self.dataset.image_shape,
            self.seed,
            self.validation_fraction,
        )

    def train(
        self, data: PreparedData, folder: Path, stop: StopRequest, config_text: str
    ) -> dict[str, Any]:
        """Distil into `folder`, then evaluate unless asked to stop; returns the results."""
        results = self._empty_results()

        def begin() -> None:
            if rank() == 0:
                write_text(folder / CONFIG, config_text)
            _write(folder / RESULTS, results)

        provenance = {
            "dataset": self.dataset.name,
            "seed": self.seed,
            "processes": world_size(),
            "versions": _versions(),
        }
        job = Job(
            data=data,
            network=self.network,
            augmentation=self.augmentation,
            synthetic=self.synthetic,
            evaluator=self.evaluator,
            folder=folder,
            key=self.key,
            device=self.device,
            provenance=provenance,
            description=self.describe(data),
        )
        try:
            state = self.distiller.distil(job, stop, config_text, begin)
            results["outer_steps"] = state.step
            results["wall_clock_seconds"]["distilling"] = state.seconds
            if not stop.agreed():
                stop.at_once = True
                distilled = DistilledSet.load(folder / DISTILLED)
                results["distilled_set"] = {"file": DISTILLED, **distilled.provenance}
                return self._evaluate(distilled, data, results, folder / RESULTS)
        except KeyboardInterrupt:
            pass  # a second Ctrl-C while distilling, or the first while evaluating
        results["status"] = "interrupted"
        _write(folder / RESULTS, results)
        return results

    def evaluate(
        self,
        set_path: Path,
        results_path: Path,
        training_sets: Sequence[str] = TRAINING_SETS,
        *,
        values: str = TRANSFORMED,
        architectures: Mapping[str, nn.Module] | None = None,
        hard_labels: bool = False,
        scores: bool = False,
    ) -> dict[str, Any]:
        """Evaluate a distilled set with its own transform; returns and writes the results.

        Args:
            set_path: A set of ours, or whatever `load_foreign_set` reads, for which the transform
                is fitted anew.
            results_path: Where the results go.
            training_sets: Of `TRAINING_SETS` only these are measured.
            values: What a foreign set's images are: "pixels" or "transformed".
            architectures: Further networks to judge the same set by.
            hard_labels: Replace soft labels by their largest entry.
            scores: Also measure what DD-Ranking's scores need, and give them.

        Raises:
            ValueError: The set is not for this dataset, or the scores lack the full data.
        """
        if scores and not self.evaluator.full_data_networks:
            raise ValueError("the scores need Evaluator.full_data_networks of at least 1; it is 0")
        data = None
        if set_path.suffix == ".safetensors":
            distilled = DistilledSet.load(set_path)
        else:
            data = self.prepare()
            distilled = load_foreign_set(set_path, self.dataset, data.transform.to("cpu"), values)
        if distilled.class_names != self.dataset.class_names:
            raise ValueError(
                f"{set_path} has {len(distilled.class_names)} classes "
                f"{list(distilled.class_names)[:3]} …; the dataset {self.dataset.name} has others"
            )
        if hard_labels and distilled.labels.is_floating_point():
            distilled = replace(distilled, labels=distilled.labels.argmax(dim=1))
        results = self._empty_results()
        results["images_per_class"] = len(distilled.images) // self.dataset.num_classes
        results["wall_clock_seconds"]["distilling"] = distilled.provenance.get("seconds")
        results["outer_steps"] = distilled.provenance.get("outer_step")
        results["distilled_set"] = {"file": set_path.name, **distilled.provenance}
        data = self.prepare(distilled.transform) if data is None else data
        return self._evaluate(
            distilled, data, results, results_path, training_sets, architectures or {}, scores
        )

    def _evaluate(
        self,
        distilled: DistilledSet,
        data: PreparedData,
        results: dict[str, Any],
        results_path: Path,
        training_sets: Sequence[str] = TRAINING_SETS,
        architectures: Mapping[str, nn.Module] | None = None,
        scores: bool = False,
    ) -> dict[str, Any]:
        began = time.perf_counter()
        key = self.key.fold("evaluation")
        images, labels = distilled.images.to(self.device), distilled.labels.to(self.device)
        rate = distilled.provenance.get("learning_rate")

        def measure(
            name: str, network: nn.Module, evaluator: Evaluator, labels: torch.Tensor
        ) -> Accuracy | None:
            if name == "random_real":
                per_class = len(images) // data.num_classes
                return evaluator.random_real(per_class, network, data, key)
            if name == "distilled":
                return evaluator.distilled(images, labels, network, data, key, rate)
            return evaluator.full_data(network, data, key)

        def write(status: str) -> None:
            results["status"] = status
            results["wall_clock_seconds"]["evaluating"] = time.perf_counter() - began
            _write(results_path, results)

        for name in TRAINING_SETS:
            if name in training_sets:
                accuracy = measure(name, self.network, self.evaluator, labels)
                results["accuracy"][name] = None if accuracy is None else accuracy.as_dict()
                write("evaluating")
        for architecture, network in (architectures or {}).items():
            results["architectures"][architecture] = across = {}
            for name in TRAINING_SETS[:2]:
                if name in training_sets:
                    accuracy = measure(name, network, self.evaluator, labels)
                    across[name] = None if accuracy is None else accuracy.as_dict()
                    write("evaluating")
        if scores:
            results["scores"] = self._scores(measure, labels)
        write("complete")
        return results

    def _scores(
        self, measure: Callable[..., Accuracy | None], labels: torch.Tensor
    ) -> dict[str, float]:
        """DD-Ranking's scores of a set, from accuracies measured here, with the same networks."""
        hard = labels.argmax(dim=1) if labels.is_floating_point() else labels
        plain = self.evaluator.without_augmentation()

        def mean(name: str, evaluator: Evaluator, labels: torch.Tensor = labels) -> float:
            accuracy = measure(name, self.network, evaluator, labels)
            assert accuracy is not None, "full_data_networks was checked"
            return accuracy.mean

        distilled, random_real = (mean(n, self.evaluator) for n in ("distilled", "random_real"))
        real = mean("full_data", self.evaluator)
        of_hard = mean("distilled", self.evaluator, hard) if hard is not labels else distilled
        return {
            "label_robust": label_robust_score(real, of_hard, distilled, random_real),
            "augmentation_robust": augmentation_robust_score(
                distilled, random_real, mean("distilled", plain), mean("random_real", plain)
            ),
        }

    def _empty_results(self) -> dict[str, Any]:
        return {
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            "status": "running",
            "dataset": self.dataset.name,
            "images_per_class": self.synthetic.images_per_class,
            "accuracy": dict.fromkeys(TRAINING_SETS),
            "network": type(self.network).__name__,
            "architectures": {},
            "scores": None,
            "protocol": self.evaluator.protocol.name,
            "selection": "validation split of the training data; test set used once",
            "seed": self.seed,
            "outer_steps": None,
            "wall_clock_seconds": {"distilling": 0.0, "evaluating": 0.0},
            "device": _device_name(self.device),
            "versions": _versions(),
        }


def _write(path: Path, results: dict[str, Any]) -> None:
    """Write results; of several processes the first one does."""
    if rank() == 0:
        write_json(path, results)


def _versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "torchopt", "numpy")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _device(name: str) -> torch.device:
    if name == "auto":
        return own_cuda_device() if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={name!r}: it must be 'auto', 'cpu' or 'cuda'") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r}: it must be 'auto', 'cpu' or 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: no CUDA device is available here")
    if device.type == "cuda" and world_size() > 1:
        if device.index is not None:
            raise ValueError(
                f"device={name!r}: {world_size()} processes cannot share one GPU; with 'cuda' "
                "each has its own"
            )
        return own_cuda_device()
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
