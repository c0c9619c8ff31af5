"""Datasets in the layouts of real ones, but tiny."""

from pathlib import Path

import numpy as np
from PIL import Image

WNIDS = ("n03", "n01", "n02")  # as in the real wnids.txt, in no order


def write_image(
    path: Path, value: int, size: tuple[int, int] = (16, 16), mode: str = "RGB"
) -> None:
    """A noisy picture whose red channel, or grey, is about `value`."""
    noise = np.random.default_rng(value).integers(0, 8, (size[1], size[0], 3), dtype=np.uint8)
    noise[..., 0] += np.uint8(value)
    pixels = noise if mode == "RGB" else noise[..., 0]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)


def write_tiny_imagenet(root: Path, train: int = 8, validation: int = 3, size: int = 16) -> Path:
    """Tiny-ImageNet with three classes; one image of each is grey. Returns `root`.

    The images of class 0, 1, 2 are about 40, 80, 120 bright.
    """
    lines = []
    for label, wnid in enumerate(WNIDS):
        brightness = 40 * (label + 1)
        for index in range(train):
            name = f"{wnid}_{index}.JPEG"
            mode = "L" if index == 0 else "RGB"
            write_image(root / "train" / wnid / "images" / name, brightness, (size, size), mode)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t9\t9\n")
        for index in range(validation):
            name = f"val_{3 * index + label}.JPEG"
            write_image(root / "val" / "images" / name, brightness, (size, size))
            lines.append(f"{name}\t{wnid}\t0\t0\t9\t9\n")
    (root / "val" / "val_annotations.txt").write_text("".join(sorted(lines)))
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    (root / "words.txt").write_text("n01\tgoldfish, Carassius\nn02\tscorpion\nn09\tother\n")
    return root
