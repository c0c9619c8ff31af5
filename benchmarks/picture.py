"""The picture of the README: a real image of each class above distilled ones.

    python benchmarks/picture.py --data data

It shows sets that come with `dd`; --cifar10 and --digits take others, also runs. Distilled images
are stretched as in all pictures of `dd`.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from dd.data import ImageDataset, cifar10, digits, to_unit_range
from dd.distillation.gallery import stretched
from dd.exchange.shipped import load

#: Of a class that a set has several images of, at most so many are shown.
MOST = 3


def of_each_class(images: Tensor, labels: Tensor, classes: int, which: int) -> Tensor:
    """Images [K, C, H, W]: the one numbered `which` of every class."""
    return torch.stack([images[int((labels == k).nonzero()[which])] for k in range(classes)])


def rows(dataset: ImageDataset, name: str) -> list[tuple[str, Tensor]]:
    """(label, images [K, C, H, W] in [0, 1]): a real row, and distilled ones."""
    distilled, count = load(name), dataset.num_classes
    hard = distilled.labels if distilled.labels.dim() == 1 else distilled.labels.argmax(dim=1)
    real = of_each_class(dataset.train_images, dataset.train_labels, count, 0)
    learned = stretched(distilled.pixels())
    shown = range(min(MOST, distilled.images_per_class))
    found = [of_each_class(learned, hard, count, which) for which in shown]
    labels = ["distilled" if which == len(found) // 2 else "" for which in shown]
    return [("real", to_unit_range(real)), *zip(labels, found, strict=True)]


def draw(parts: list[tuple[ImageDataset, str]], out: Path) -> None:
    """The rows of each dataset, with the names of its classes above them."""
    columns = max(dataset.num_classes for dataset, _ in parts)
    lines: list[tuple[tuple[str, ...], str, Tensor] | None] = []
    for dataset, name in parts:
        lines += [None] if lines else []
        for label, images in rows(dataset, name):
            lines.append((dataset.class_names if label == "real" else (), label, images))
    heights = [0.28 if line is None else 1.0 for line in lines]
    figure, axes = plt.subplots(
        len(heights),
        columns,
        figsize=(0.92 * columns + 0.75, 0.96 * sum(heights)),
        gridspec_kw={"height_ratios": heights, "wspace": 0.06, "hspace": 0.06},
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for line, drawn in zip(lines, axes, strict=True):
        if line is None:
            continue
        names, label, images = line
        for index, image in enumerate(images):
            grey = image.shape[0] == 1
            drawn[index].imshow(
                image[0] if grey else image.permute(1, 2, 0),
                cmap="gray" if grey else None,
                vmin=0,
                vmax=1,
                interpolation="nearest",
            )
            if names:
                drawn[index].set_title(names[index], fontsize=9, pad=3)
        place = {"transform": drawn[0].transAxes, "ha": "right", "va": "center"}
        drawn[0].text(-0.12, 0.5, label, **place)
    figure.subplots_adjust(left=0.09, right=0.995, top=0.96, bottom=0.01)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data", help="where CIFAR-10 is")
    parser.add_argument("--cifar10", default="cifar10-ipc1", help="a set of CIFAR-10")
    parser.add_argument("--digits", default="digits-ipc1", help="a set of the digits")
    parser.add_argument("--out", type=Path, default=Path("docs/distilled.png"))
    options = parser.parse_args()
    draw([(cifar10(options.data), options.cifar10), (digits(), options.digits)], options.out)


if __name__ == "__main__":
    main()
