"""One experiment as a gin file describes it: the parts, and what is done with them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

import bilevel
from bilevel.checks import (
    check_callable,
    check_choice,
    check_instance,
    check_integer,
    check_number,
)
from bilevel.distributed import world_size
from dd.augmentation import Augmentation
from dd.data import ImageDataset, PixelTransform
from dd.data.image_dataset import fingerprint
from dd.data.prepared import PreparedData, prepare
from dd.distillation.events import Event
from dd.distillation.loop import begin, progress
from dd.distillation.memory import out_of_memory_advice
from dd.distillation.monitor import show_result
from dd.distillation.recorder import DISTILLED, EVENTS
from dd.distillation.rehearsal import rehearsed
from dd.distillation.resuming import circumstances
from dd.distillation.runner import run_to_end
from dd.distillation.settings import Distiller
from dd.evaluation.assessment import Assessment
from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.earlier import earlier_results
from dd.evaluation.evaluator import Evaluator
from dd.evaluation.foreign_set import load_foreign_set
from dd.evaluation.names import RESULTS, TRAINING_SETS, TRANSFORMED
from dd.evaluation.report import Report, new_report, versions, write_results
from dd.networks import network_for
from dd.objectives.base import Task
from dd.objectives.expert_buffer import describe
from dd.runtime.changes import Judging
from dd.runtime.devices import chosen_device
from dd.runtime.files import DamagedFileError, write_sealed
from dd.runtime.memory import NotEnoughMemoryError, check_fits, ran_out
from dd.runtime.plain import one_line
from dd.runtime.run_folder import RunFolder
from dd.runtime.sizes import LARGEST_SEED
from dd.runtime.stopping import StopRequest
from dd.synthetic.dataset import SyntheticDataset

CONFIG = "config.gin"


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
        network: Judging[Callable[..., nn.Module]],
        augmentation: Augmentation,
        synthetic: SyntheticDataset,
        distiller: Distiller,
        evaluator: Evaluator,
        seed: int = 0,
        validation_fraction: float = 0.1,
        device: Judging[str] = "auto",
        images_on: Judging[str] = "device",
    ) -> None:
        check_instance("dataset", dataset, ImageDataset, "@cifar10() with ()")
        check_callable("transform", transform, "@kip_whitening without ()")
        check_callable("network", network, "@ConvNet without ()")
        check_instance("augmentation", augmentation, Augmentation, "@FlipOrRotate() with ()")
        check_instance("synthetic", synthetic, SyntheticDataset, "@SyntheticDataset() with ()")
        check_instance("distiller", distiller, Distiller, "@Distiller() with ()")
        check_instance("evaluator", evaluator, Evaluator, "@Evaluator() with ()")
        self.dataset = dataset
        self.transform = transform
        self.augmentation = augmentation
        self.synthetic = synthetic
        self.distiller = distiller
        self.evaluator = evaluator
        self.seed = check_integer("seed", seed, 0, LARGEST_SEED)
        self.validation_fraction = check_number(
            "validation_fraction", validation_fraction, above=0, below=1
        )
        self.device = chosen_device(device)
        self.images_on = check_choice("images_on", images_on, ("device", "host"))
        channels, height, width = dataset.image_shape
        if height != width:
            raise ValueError(f"dataset: its images are {height}×{width}; they must be square")
        classes = dataset.num_classes
        #: What a network is made for.
        self.image_format = {"num_classes": classes, "channels": channels, "image_size": height}
        self.network = network_for(network, self.image_format)
        distiller.objective.check(self.network, dataset.image_shape, synthetic)
        # A set has a gradient and Adam's two moments.
        size = 16 * classes * math.prod(dataset.image_shape)
        check_fits("images_per_class", synthetic.images_per_class, size, self.device)
        # On the CPU, so that a seed means the same on every device.
        self.key = bilevel.Key(seed)

    def prepare(self, transform: PixelTransform | None = None) -> PreparedData:
        """Split the dataset and transform it, by a given transform or by a newly fitted one."""
        fit = self.transform if transform is None else transform
        try:
            return prepare(
                self.dataset, fit, self.validation_fraction, self.seed, self.device, self.images_on
            )
        except TypeError as error:
            raise ValueError(f"transform: it cannot be fitted: {error}") from error
        except ValueError as error:
            raise ValueError(f"the dataset cannot be prepared: {error}") from error

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

    def task(
        self, data: PreparedData, folder: Path | None, seed: int | None = None, config: str = ""
    ) -> Task:
        """What the distiller works on, from this experiment's seed or another one.

        Args:
            data: What `prepare` returned.
            folder: Where the run is kept; None: nowhere.
            seed: Of the distillation; the split of the data has the experiment's.
            config: The operative configuration, for the set to carry.
        """
        seed = self.seed if seed is None else seed
        return Task(
            data=data,
            network=self.network,
            augmentation=self.augmentation,
            synthetic=self.synthetic,
            evaluator=self.evaluator,
            folder=RunFolder(folder),
            key=bilevel.Key(seed),
            device=self.device,
            provenance={
                "dataset": self.dataset.name,
                "seed": seed,
                "processes": world_size(),
                "versions": versions(),
            },
            description=self.describe(data),
            circumstances=circumstances(fingerprint(self.dataset), self.device, versions()),
            config=config,
        )

    def rehearsed(self, data: PreparedData, advice: str) -> Iterator[str]:
        """Take an outer step, write nothing, and tell line by line what the whole run takes."""
        return rehearsed(begin(self.distiller, self.task(data, None)), advice)

    def train(
        self,
        data: PreparedData,
        folder: Path,
        stop: StopRequest,
        config_text: str,
        *,
        evaluate: bool = True,
        advice: str = "",
        watch: Callable[[Event], object] = lambda event: None,
    ) -> Report:
        """Distil into `folder`, then evaluate, if that is wanted, unless asked to stop.

        Whatever ends it, `results.json` says so. `advice` is what to do where a CPU will not finish
        it; `watch` is called with every event of the loop.
        """
        report = self._new_report(self.synthetic.images_per_class)
        task = self.task(data, folder, config=config_text)
        earlier = earlier_results(folder / RESULTS)

        def write(report: Report) -> None:
            write_results(task.folder, RESULTS, report, earlier)

        run = None
        try:
            run = begin(self.distiller, task)
            report = report.of_size(run.candidate("images"))
            if progress(self.distiller, run.state) >= 1:  # so what was measured is of this set
                with suppress(DamagedFileError, FileNotFoundError):  # then it is written anew
                    report = report.of_set(DISTILLED, DistilledSet.load(folder / DISTILLED))
            task.folder.write(CONFIG, partial(write_sealed, text=config_text))
            write(report)
            run_to_end(
                run, folder, stop, config_text, advice, watch, "evaluation" if evaluate else ""
            )
            report = report.after(run.state.step, run.state.skipped, run.state.seconds)
            if not stop.agreed():
                stop.at_once = True
                distilled = DistilledSet.load(folder / DISTILLED)
                report = report.of_set(DISTILLED, distilled)
                if not evaluate:
                    report = replace(report, status="complete")
                    write(report)
                    return report
                assessment = self._assessment(distilled, data)
                print(assessment.announcement(), flush=True)
                for measured in assessment.measured(report):
                    report = measured
                    write(report)
                found = report.outer_steps, config_text, report.means
                task.folder.write(EVENTS, lambda events: show_result(events, *found))
                return report
        except KeyboardInterrupt:
            # A second one while distilling, or the first while the set is judged.
            if run is not None and not run.half_done:
                report = report.after(run.state.step, run.state.skipped, run.state.seconds)
        except Exception as error:
            told: Exception = error
            if ran_out(error):
                told = NotEnoughMemoryError(out_of_memory_advice(self.distiller, task))
            if run is not None:
                failed = report.after(run.state.step, run.state.skipped, run.state.seconds)
                reason = one_line(f"{type(told).__name__}: {told}")
                with suppress(OSError):  # such as a full disk, which may be what is wrong
                    write(replace(failed, status="failed", reason=reason))
            if told is not error:
                raise told from error
            raise
        report = replace(report, status="interrupted")
        write(report)
        return report

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
        baselines: Sequence[str] = (),
    ) -> Report:
        """Evaluate a distilled set with its own transform; the results are also written.

        Args:
            set_path: A set of ours, or whatever `load_foreign_set` reads, for which the transform
                is fitted anew.
            results_path: Where the results go.
            training_sets: Of `TRAINING_SETS` only these are measured.
            values: What a foreign set's images are: "pixels" or "transformed".
            architectures: Further networks to judge the same set by.
            hard_labels: Replace soft labels by their largest entry.
            scores: Also measure what DD-Ranking's scores need, and give them.
            baselines: Of `BASELINES`: also choose real images like this, and judge them.

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
        distilled.check_classes(str(set_path), self.dataset)
        if hard_labels:
            distilled = distilled.with_hard_labels()
        report = self._new_report(distilled.images_per_class)
        report = report.of_saved_set(set_path.name, distilled)
        data = self.prepare(distilled.transform) if data is None else data
        folder, earlier = RunFolder(results_path.parent), earlier_results(results_path)
        wanted = training_sets, architectures, scores, baselines
        try:
            for measured in self._assessment(distilled, data).measured(report, *wanted):
                report = measured
                write_results(folder, results_path.name, report, earlier)
        except KeyboardInterrupt:
            report = replace(report, status="interrupted")
            write_results(folder, results_path.name, report, earlier)
            raise
        return report

    def _new_report(self, images_per_class: int) -> Report:
        data = self.dataset, fingerprint(self.dataset), images_per_class
        return new_report(*data, self.network, self.evaluator, self.seed, self.device)

    def _assessment(self, distilled: DistilledSet, data: PreparedData) -> Assessment:
        key = self.key.fold("evaluation")
        return Assessment(distilled, data, self.network, self.evaluator, key)
