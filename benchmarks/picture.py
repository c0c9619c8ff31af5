"""The picture of the README: one real image of each class above the distilled one.

python -m dd.train --gin_file=gin/cifar10_cpu.gin --run_dir=runs/cpu
python -m dd.train --gin_file=gin/digits.gin --run_dir=runs/digits
    python benchmarks/picture.py --cifar10 runs/cpu --digits runs/digits
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from dd.data import ImageDataset, cifar10, digits, to_unit_range
from dd.evaluation.distilled_set import DistilledSet


def first_of_each_class(images: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Images [K, C, H, W] of classes 0 … K−1."""
    return torch.stack([images[int((labels == k).nonzero()[0])] for k in range(classes)])


def stretched(images: Tensor) -> Tensor:
    """Every image [N, C, H, W] between its 1st and 99th percentile, so that few pixels set none."""
    flat = images.flatten(1)
    low, high = (torch.quantile(flat, q, dim=1)[:, None, None, None] for q in (0.01, 0.99))
    return ((images - low) / (high - low)).clamp(0, 1)


def rows(dataset: ImageDataset, run: Path) -> list[tuple[str, Tensor]]:
    """(label, images [K, C, H, W] in [0, 1]): real and distilled."""
    distilled = DistilledSet.load(run / "distilled.safetensors")
    hard = distilled.labels if distilled.labels.dim() == 1 else distilled.labels.argmax(dim=1)
    count = dataset.num_classes
    real = first_of_each_class(dataset.train_images, dataset.train_labels, count)
    learned = first_of_each_class(distilled.pixels(), hard, count)
    return [("real", to_unit_range(real)), ("distilled", stretched(learned))]


def draw(parts: list[tuple[ImageDataset, Path]], out: Path) -> None:
    """Two rows for each dataset, with the names of its classes above them."""
    columns = max(dataset.num_classes for dataset, _ in parts)
    heights = [height for _ in parts for height in (1.0, 1.0, 0.28)][:-1]
    figure, axes = plt.subplots(
        len(heights),
        columns,
        figsize=(0.92 * columns + 0.75, 0.96 * sum(heights)),
        gridspec_kw={"height_ratios": heights, "wspace": 0.06, "hspace": 0.06},
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for index, (dataset, run) in enumerate(parts):
        for offset, (label, images) in enumerate(rows(dataset, run)):
            line = axes[3 * index + offset]
            for axis, image, name in zip(line, images, dataset.class_names, strict=True):
                grey = image.shape[0] == 1
                axis.imshow(
                    image[0] if grey else image.permute(1, 2, 0),
                    cmap="gray" if grey else None,
                    vmin=0,
                    vmax=1,
                    interpolation="nearest",
                )
                if offset == 0:
                    axis.set_title(name, fontsize=9, pad=3)
            line[0].text(-0.12, 0.5, label, transform=line[0].transAxes, ha="right", va="center")
    figure.subplots_adjust(left=0.09, right=0.995, top=0.94, bottom=0.01)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data", help="where CIFAR-10 is")
    parser.add_argument("--cifar10", type=Path, required=True, help="a run on CIFAR-10")
    parser.add_argument("--digits", type=Path, required=True, help="a run on the digits")
    parser.add_argument("--out", type=Path, default=Path("docs/distilled.png"))
    options = parser.parse_args()
    draw([(cifar10(options.data), options.cifar10), (digits(), options.digits)], options.out)


if __name__ == "__main__":
    main()
