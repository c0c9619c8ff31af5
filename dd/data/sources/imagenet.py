"""ImageNet as class folders."""

from __future__ import annotations

from pathlib import Path

from bilevel.checks import check_integer, check_path
from dd.data.image_dataset import ImageDataset
from dd.data.sources.decoded_images import decoded_images
from dd.data.sources.image_files import check_same_classes, list_class_folders
from dd.runtime.changes import Anytime, Judging
from dd.runtime.sizes import LARGEST_IMAGE

_LAYOUT = "train/<class>/<image files> and val/<class>/<image files>"


def imagenet(
    root: Judging[str | Path] = "data/imagenet",
    image_size: int = 64,
    cache_folder: Anytime[str | Path | None] = None,
) -> ImageDataset:
    """ImageNet-1K, or any part of its classes: uint8 images [3, image_size, image_size].

    `root` holds `train/<class>/` and `val/<class>/`; the validation images are the test set.
    The shorter side of each image is resized to `image_size` (bilinear, antialiased) and the
    centre is cropped. Images are decoded once, into a cache that later runs memory-map: 1,331,167
    images of 64×64 take 16 GB.

    Source: Russakovsky et al., "ImageNet large scale visual recognition challenge", IJCV 2015
    (arXiv 1409.0575).

    Args:
        root: The directory; it is not downloaded.
        image_size: Height and width of the result, at least 1; 64 in the distillation papers.
        cache_folder: Where decoded images are kept; default: the environment variable
            `DD_CACHE`, or else the platform's folder for caches.

    Raises:
        DatasetNotFoundError: The directory does not have this layout or a class is empty.
        ValueError: `image_size` is not positive, the classes of `train/` and `val/`
            differ, or an image cannot be decoded (the message names it).
        OSError: The cache cannot be written.
    """
    check_integer("image_size", image_size, 1, LARGEST_IMAGE)
    root = check_path("root", root)
    if cache_folder is not None:
        check_path("cache_folder", cache_folder)
    train_paths, train_labels, class_names = list_class_folders(root / "train", root, _LAYOUT)
    test_paths, test_labels, test_names = list_class_folders(root / "val", root, _LAYOUT)
    check_same_classes(root, class_names, test_names, "val")
    name = root.absolute().name
    return ImageDataset(
        name=name,
        train_images=decoded_images(train_paths, root, image_size, f"{name}-train", cache_folder),
        train_labels=train_labels,
        test_images=decoded_images(test_paths, root, image_size, f"{name}-val", cache_folder),
        test_labels=test_labels,
        class_names=class_names,
    )
