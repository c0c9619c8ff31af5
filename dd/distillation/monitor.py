"""What one watches while a set is distilled: TensorBoard, a progress bar, pictures."""

import ast
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from bilevel import HypergradientResult
from dd.distillation.charts import HeatMap, WindowBand
from dd.distillation.gallery import beside, image_grid, stretched
from dd.runtime.devices import peak_memory

#: Of the spectrum of a low-rank Hessian, so many eigenvalues are shown, the largest.
SHOWN_EIGENVALUES = 4
#: What is shown together, under "Custom scalars".
LAYOUT = {
    "The run at a glance": {
        "outer loss": ["Multiline", ["^outer/loss$"]],
        "accuracy": ["Multiline", ["^outer/.*accuracy$", "^validation/"]],
        "window": ["Margin", ["window/stop", "window/start", "window/stop"]],
        "inner loss at both ends of the window": ["Multiline", ["^inner/"]],
        "norm of the hypergradient, and its bound": [
            "Multiline",
            ["^hypergradient/norm$", "^hypergradient/clip_bound$"],
        ],
        "seconds of an outer step, and of its parts": ["Multiline", ["^time/"]],
    }
}
#: What the curves are, for the button beside each.
DESCRIPTIONS = {
    "outer/loss": "F(θ_stop, φ): the outer loss on real images after each inner run.",
    "outer/accuracy": "Share of the real images of the outer batch that are labelled rightly.",
    "outer/held_out_accuracy": "The same, of images of the validation split.",
    "hypergradient/norm": "‖dF/dφ‖₂ over all outer variables, before clipping.",
    "hypergradient/clip_bound": "The norm that the images' hypergradient is clipped to.",
    "hypergradient/cotangent_growth": "‖λ_start‖ / ‖λ_stop‖: above 1 the way back amplifies.",
    "window/start": "The first inner step that is differentiated.",
    "window/stop": "The inner step after the last one that is differentiated.",
    "window/width": "How many inner steps are differentiated.",
    "inner/loss_at_start": "The loss on the distilled images at the first inner step.",
    "inner/loss_at_stop": "The loss on the distilled images at the end of the window.",
    "time/seconds_per_step": "Wall clock of an outer step.",
    "time/hypergradient": "Of it, reading real images and the next three.",
    "time/rollout": "The inner run, without a graph or with one.",
    "time/selection": "Choosing the window that is differentiated.",
    "time/backward": "The outer loss, and the way back through the window.",
    "time/outer_update": "Of it, clipping and the outer optimizer.",
    "memory/peak_MiB": "The most memory so far, of the GPU or else of the process.",
    "validation/accuracy": "Of fresh networks trained on the set, on the validation split.",
    "validation/best_accuracy": "The best so far, of the set that is kept.",
    "accuracy/distilled": "Test accuracy of networks trained on the distilled set, at the end.",
    "accuracy/random_real": "The same on as many random real images.",
    "accuracy/full_data": "The same on all training images.",
}


@final
class Monitor:
    """Writes TensorBoard events of one run.

    Args:
        folder: Where the events go.
        first_step: The step a resumed run goes on from; later events of an earlier process, which
            the resumed one will write again, are hidden.
        inner_steps: T, which charts over the inner steps are as high as; none are drawn by default.
    """

    def __init__(self, folder: Path, first_step: int = 0, inner_steps: int | None = None) -> None:
        _wait_for_a_later_name(folder)
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else 0)
        self._file: Any = self._writer.file_writer
        self._writer.add_custom_scalars(LAYOUT)
        self._described: set[str] = set()
        self._inner_steps = inner_steps
        self._band: WindowBand | None = None
        self._maps: dict[str, HeatMap] = {}

    def config(self, text: str) -> None:
        """Show the configuration."""
        self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))

    def outer_step(
        self,
        step: int,
        result: HypergradientResult,
        bound: float | None,
        seconds: float,
        parts: Mapping[str, float] | None = None,
        stage: str | None = None,
    ) -> None:
        """Show what one outer step did.

        Args:
            step: Outer step.
            result: Its hypergradient.
            bound: The norm that the images' hypergradient was clipped to; None without clipping.
            seconds: How long the step took.
            parts: The same by what was done.
            stage: Of the schedule, if it has stages.
        """
        scalars: dict[str, Tensor | float] = {
            "outer/loss": result.loss,
            **{f"outer/{name}": value for name, value in result.metrics.items()},
            "hypergradient/norm": result.stats.hypergradient_norm,
            "window/start": result.window.start,
            "window/stop": result.window.stop,
            "window/width": result.window.width,
            "inner/loss_at_start": result.trace["inner_loss"][0],
            "inner/loss_at_stop": result.trace["inner_loss"][result.window.stop - 1],
            "time/seconds_per_step": seconds,
            **{f"time/{name}": value for name, value in (parts or {}).items()},
            "memory/peak_MiB": peak_memory(result.loss.device) / 2**20,
        }
        if bound is not None:
            scalars["hypergradient/clip_bound"] = bound
        if result.stats.cotangent_norms is not None:
            first, last = result.stats.cotangent_norms[[0, -1]].tolist()
            scalars["hypergradient/cotangent_growth"] = first / max(last, 1e-30)
        low_rank = result.stats.low_rank
        if low_rank is not None:
            scalars["low_rank/rank"] = low_rank.rank
            scalars["low_rank/evaluations"] = low_rank.evaluations
            scalars["low_rank/exact"] = low_rank.exact
            if low_rank.staleness is not None:
                scalars["low_rank/staleness"] = low_rank.staleness
            for index, value in enumerate(low_rank.spectrum[:SHOWN_EIGENVALUES].tolist()):
                scalars[f"low_rank/eigenvalue_{index}"] = value
        self.scalars(step, {name: float(value) for name, value in scalars.items()})
        if self._inner_steps is None:
            return
        if self._band is None:
            self._band = WindowBand("the window that is differentiated", self._inner_steps)
        self._band.append(step, result.window.start, result.window.stop, stage)
        profiles = dict(result.trace.items())
        for name, profile in profiles.items():
            self._map(name).append(step, profile)
        if result.stats.cotangent_norms is not None:
            self._map("cotangent_norm").append(
                step, result.stats.cotangent_norms, result.window.start
            )

    def charts(self, step: int) -> None:
        """Show what is drawn over all outer steps so far."""
        if self._band is not None:
            self._writer.add_image("charts/window", self._band.picture(), step)
        for name, drawn in self._maps.items():
            self._writer.add_image(f"charts/{name}", drawn.picture(), step)

    def _map(self, name: str) -> HeatMap:
        assert self._inner_steps is not None, "without inner steps there is none"
        if name not in self._maps:
            self._maps[name] = HeatMap(name.replace("_", " "), self._inner_steps)
        return self._maps[name]

    def schedule(self, step: int, report: Mapping[str, Tensor | float]) -> None:
        """Show what a truncation schedule sees and does.

        Args:
            step: Outer step.
            report: Numbers, and non-negative profiles over the inner steps of shape [T], which are
                shown as histograms: the horizontal axis is the inner step, the height the value
                there.
        """
        for name, value in report.items():
            if not isinstance(value, Tensor):
                self.scalars(step, {f"schedule/{name}": float(value)})
            else:
                heights = value.double().cpu()
                at = torch.arange(len(heights), dtype=torch.float64)
                self._writer.add_histogram_raw(
                    f"schedule/{name}",
                    min=0.0,
                    max=float(len(heights)),
                    num=float(heights.sum()),
                    sum=float((at * heights).sum()),
                    sum_squares=float((at**2 * heights).sum()),
                    bucket_limits=(at + 1).tolist(),
                    bucket_counts=heights.tolist(),
                    global_step=step,
                )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show named numbers, the first time with what they are."""
        for name, value in values.items():
            metadata = None
            if name in DESCRIPTIONS and name not in self._described:
                self._described.add(name)
                metadata = SummaryMetadata(
                    summary_description=DESCRIPTIONS[name],
                    plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"),
                )
            told = Summary.Value(tag=name, simple_value=value, metadata=metadata)
            self._file.add_summary(Summary(value=[told]), step)

    def images(
        self,
        step: int,
        pixels: Tensor,
        images_per_class: int,
        class_names: Sequence[str] = (),
        real: Tensor | None = None,
    ) -> None:
        """Show the synthetic images: clamped to [0, 1], and each channel of each stretched.

        Args:
            step: Outer step.
            pixels: [N, C, H, W], ordered by class.
            images_per_class: How many images each class has.
            class_names: What is written over them.
            real: Of every image one that is shown beside it, in the same form.
        """
        for name, form in (
            ("clamped", partial(torch.clamp, min=0, max=1)),
            ("stretched", stretched),
        ):
            shown = beside(form(pixels), None if real is None else form(real))
            grid = image_grid(shown, images_per_class, class_names)
            self._writer.add_image(f"synthetic_images/{name}", grid, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def show_result(
    folder: Path, step: int | None, config_text: str, accuracies: Mapping[str, float]
) -> None:
    """Show what a run found beside what it was configured with, under "HParams".

    Args:
        folder: Of the run's events.
        step: Outer steps done.
        config_text: The configuration; of it, numbers, strings and truth values are shown.
        accuracies: Fractions, by what they are of.
    """
    found = {f"accuracy/{name}": value for name, value in accuracies.items()}
    with _last_writer(folder) as writer:
        file: Any = writer.file_writer
        for summary in hparams(_plain_parameters(config_text), found):
            file.add_summary(summary)
        for name, value in found.items():
            writer.add_scalar(name, value, step)


def _last_writer(folder: Path) -> SummaryWriter:
    """A writer whose file is read last, without waiting for it unless that is needed.

    Files of one second and process are numbered, and "10" comes before "9". What is read before a
    monitor's events is hidden by them.
    """
    before = set(folder.glob("events.out.tfevents.*"))
    writer = SummaryWriter(str(folder))
    (made,) = set(folder.glob("events.out.tfevents.*")) - before
    if all(path < made for path in before):
        return writer
    writer.close()
    made.unlink()
    _wait_for_a_later_name(folder)
    return SummaryWriter(str(folder))


def _plain_parameters(config_text: str) -> dict[str, Any]:
    """The parameters of a configuration that are numbers, strings or truth values."""
    found: dict[str, Any] = {}
    for line in config_text.splitlines():
        name, equals, text = line.partition(" = ")
        if not equals or name.startswith("#"):
            continue
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            continue
        if isinstance(value, (bool, int, float, str)):
            found[name] = value
    return found


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait, for a second at most, until a new file of events would be named after those there.

    TensorBoard reads them in the order of their names, which begin with the second they were made
    in; within a second chance decides.
    """
    parts = (path.name.split(".") for path in folder.glob("events.out.tfevents.*"))
    seconds = [int(each[3]) for each in parts if each[3].isdecimal()]
    ahead = max(seconds, default=0) + 1 - time.time()
    if 0 < ahead <= 1:
        time.sleep(ahead)
