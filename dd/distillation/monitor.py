"""What one watches while a set is distilled: TensorBoard, a progress bar, pictures."""

import io
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import final

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from bilevel import HypergradientResult
from dd.runtime.plain import plain

#: Of the spectrum of a low-rank Hessian, so many eigenvalues are shown, the largest.
SHOWN_EIGENVALUES = 4
#: Classes and images of each that are shown at most, and the least side of an image in pixels.
MOST_CLASSES = 20
MOST_ROWS = 10
LEAST_SIDE = 64


@final
class Monitor:
    """Writes TensorBoard events of one run.

    Args:
        folder: Where the events go.
        first_step: The step a resumed run goes on from; later events of an earlier process, which
            the resumed one will write again, are hidden.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        _wait_for_a_later_name(folder)
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else 0)

    def config(self, text: str) -> None:
        """Show the configuration."""
        self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))

    def outer_step(
        self, step: int, result: HypergradientResult, bound: float | None, seconds: float
    ) -> None:
        """Show what one outer step did.

        Args:
            step: Outer step.
            result: Its hypergradient.
            bound: The norm that the images' hypergradient was clipped to; None without clipping.
            seconds: How long the step took.
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
        for name, value in scalars.items():
            self._writer.add_scalar(name, float(value), step)

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
                self._writer.add_scalar(f"schedule/{name}", value, step)
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
        """Show named numbers."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, pixels: Tensor, images_per_class: int) -> None:
        """Show the synthetic images: clamped to [0, 1], and each stretched to that range.

        Args:
            step: Outer step.
            pixels: [N, C, H, W], ordered by class.
            images_per_class: How many images each class has.
        """
        for name, shown in (("clamped", pixels.clamp(0, 1)), ("stretched", stretched(pixels))):
            grid = image_grid(shown, images_per_class)
            self._writer.add_image(f"synthetic_images/{name}", grid, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


@final
class Progress:
    """A bar over outer steps, or over minutes where the run is limited by them.

    Args:
        outer_steps: The last outer step.
        minutes: The most minutes, or None.
        step: The step a resumed run goes on from.
        seconds: The seconds spent before.
    """

    def __init__(
        self,
        outer_steps: int,
        minutes: float | None,
        step: int = 0,
        seconds: float = 0.0,
    ) -> None:
        self._by_time = minutes is not None
        self._outer_steps, self._first = outer_steps, (step, seconds)
        self._bar = tqdm(
            total=round(minutes * 60) if minutes is not None else outer_steps,
            initial=round(seconds) if minutes is not None else step,
            desc="distilling",
            unit="s" if self._by_time else "step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
            bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed} < {remaining}{postfix}]",
        )

    def update(self, step: int, seconds: float, loss: float, metrics: Mapping[str, float]) -> None:
        """Show the state after `step` outer steps and `seconds` of work."""
        done, spent = step - self._first[0], seconds - self._first[1]
        rate = done / spent if spent else 0.0
        speed = f"{rate:.2f} steps/s" if rate >= 1 or not rate else f"{1 / rate:.2f} s/step"
        shown = ", ".join(
            f"accuracy {100 * value:.1f} %" if name == "accuracy" else f"{name} {value:.3g}"
            for name, value in metrics.items()
        )
        self._bar.set_postfix_str(
            f"step {step}, loss {loss:.3f}, {shown}, {speed}",
            refresh=False,
        )
        target = min(int(seconds), int(self._bar.total)) if self._by_time else step
        self._bar.update(target - self._bar.n)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._bar.write(plain(message), file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def stretched(pixels: Tensor) -> Tensor:
    """Every image [N, C, H, W] stretched to the range [0, 1]."""
    low, high = (bound(pixels, (1, 2, 3), keepdim=True) for bound in (torch.amin, torch.amax))
    return (pixels - low) / (high - low).clamp_min(1e-6)


def image_grid(pixels: Tensor, images_per_class: int) -> Tensor:
    """The first images of each class as one picture [3, H', W'].

    A column for each class; with one image per class, rows of five or ten.
    """
    by_class = pixels.detach().cpu().unflatten(0, (-1, images_per_class))[:MOST_CLASSES]
    if images_per_class == 1:
        shown, columns = by_class[:, 0], 5 if len(by_class) <= 10 else 10
    else:
        columns = len(by_class)
        shown = by_class[:, :MOST_ROWS].transpose(0, 1).flatten(0, 1)
    factor = -(-LEAST_SIDE // shown.shape[-1])
    shown = torch.nn.functional.interpolate(shown, scale_factor=factor, mode="nearest")
    return make_grid(shown, nrow=columns, padding=2, pad_value=1.0)


def png(pixels: Tensor, images_per_class: int) -> bytes:
    """The grid of stretched images as a PNG file."""
    buffer = io.BytesIO()
    to_pil_image(image_grid(stretched(pixels), images_per_class)).save(buffer, "PNG")
    return buffer.getvalue()


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
