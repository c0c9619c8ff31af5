"""TensorBoard: what one watches while a set is distilled."""

from collections.abc import Mapping
from pathlib import Path
from typing import final

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from bilevel import HypergradientResult
from dd.pictures import image_grid, stretched

#: Of the spectrum of a low-rank Hessian, so many eigenvalues are shown, the largest.
SHOWN_EIGENVALUES = 4


@final
class Monitor:
    """Writes TensorBoard events of one run.

    Args:
        folder: Where the events go; None in processes that write nothing.
        first_step: The step a resumed run goes on from; later events of an earlier process, which
            the resumed one will write again, are hidden.
    """

    def __init__(self, folder: Path | None, first_step: int = 0) -> None:
        self._writer = None
        if folder is not None:
            purge_step = first_step + 1 if first_step else 0
            self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def config(self, text: str) -> None:
        """Show the configuration."""
        if self._writer is None:
            return
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
        if self._writer is None:
            return
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
        if self._writer is None:
            return
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
        if self._writer is None:
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, pixels: Tensor, images_per_class: int) -> None:
        """Show the synthetic images: clamped to [0, 1], and each stretched to that range.

        Args:
            step: Outer step.
            pixels: [N, C, H, W], ordered by class.
            images_per_class: How many images each class has.
        """
        if self._writer is None:
            return
        for name, shown in (("clamped", pixels.clamp(0, 1)), ("stretched", stretched(pixels))):
            grid = image_grid(shown, images_per_class)
            self._writer.add_image(f"synthetic_images/{name}", grid, step)

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()
