"""What somebody gives in Python, as gin bindings: a dataset, a network, a schedule."""

import functools
import inspect
import io
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

import gin
from dd.data import ImageDataset
from dd.data.pictures import to_pixels
from dd.gin_text import nearest, registered, registered_names
from dd.runtime.files import write_bytes

Array = NDArray[Any]
#: What can be distilled.
Data = str | Path | ImageDataset | tuple[Any, Any] | Dataset[Any]


def dataset_bindings(
    dataset: Data, folder: Path, image_size: int
) -> tuple[list[str], dict[Path, dict[str, Array]]]:
    """Bindings of `Experiment.dataset`, and what must first be in `folder`: arrays by their file.

    Raises:
        FileNotFoundError: It is a path, and nothing is there.
        ValueError: It is nothing that can be distilled.
    """
    if isinstance(dataset, (str, Path)):
        return _of_path(dataset, image_size), {}
    if isinstance(dataset, ImageDataset):
        # The dataset is called like the file.
        path = folder / f"{dataset.name.replace('/', '_')}.npz"
        content, first = _arrays_of(dataset), ["arrays.channels = 'first'"]
    elif isinstance(dataset, tuple) and len(dataset) == 2:
        path, first = folder / "dataset.npz", []
        content = dict(zip(("images", "labels"), map(_as_array, dataset), strict=True))
    elif _is_indexed(dataset):
        path, first = folder / "dataset.npz", ["arrays.channels = 'first'"]
        content = _collected(dataset)
    else:
        raise ValueError(
            f"dataset is {_kind(dataset)}; it must be a path, the name of a dataset, an "
            "ImageDataset, a pair (images, labels), or a torch Dataset of pairs that has a length; "
            "of what can only be iterated over, list(dataset)"
        )
    return [*_arrays(path.absolute()), *first], {path: content}


def _is_indexed(dataset: Any) -> bool:
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return indexed and not isinstance(dataset, (IterableDataset, Mapping, bytes))


def _of_path(dataset: str | Path, image_size: int) -> list[str]:
    if dataset == "":
        raise ValueError("dataset='' is empty; '.' is the working directory")
    path = Path(dataset).expanduser()
    with suppress(OSError):  # such as a name that is too long
        if path.is_dir():
            root = f"image_folder.root = {str(path.absolute())!r}"
            size = f"image_folder.image_size = {image_size!r}"
            return ["Experiment.dataset = @image_folder()", root, size]
        if path.is_file():
            return _arrays(path.absolute())
    if isinstance(dataset, str) and registered(dataset) is not None:
        return [f"Experiment.dataset = @{dataset}()"]
    raise FileNotFoundError(
        f"dataset={str(dataset)[:200]!r}: there is no such folder, no such file and no such "
        f"dataset{nearest(str(dataset), filter(_is_dataset, registered_names()))}"
    )


def _is_dataset(name: str) -> bool:
    made = inspect.signature(registered(name)).return_annotation
    return made in (ImageDataset, ImageDataset.__name__)


def keep(arrays: Mapping[Path, Mapping[str, Array]], may_differ: bool) -> None:
    """Write the arrays of a run, unless they are there.

    Args:
        arrays: By their file.
        may_differ: Whether no run has begun with those that may be there.

    Raises:
        ValueError: A run has begun with other ones.
    """
    for path, content in arrays.items():
        if path.is_file():
            if _hold(path, content):
                continue
            if not may_differ:
                raise ValueError(f"{path} holds other data: choose another run_dir")
        file = io.BytesIO()
        np.savez(file, **content)  # type: ignore[arg-type]
        write_bytes(path, file.getvalue())


def _hold(path: Path, content: Mapping[str, Array]) -> bool:
    """Whether a file has these arrays."""
    try:
        with np.load(path, allow_pickle=False) as before:
            return before.files == list(content) and all(
                np.array_equal(before[name], value) for name, value in content.items()
            )
    except (ValueError, OSError, EOFError, zipfile.BadZipFile):
        return False


def part_bindings(
    parameter: str, part: str | Callable[..., Any] | object, evaluated: bool
) -> list[str]:
    """Bindings that make a part the value of a parameter, and give it its arguments.

    Args:
        parameter: Its name, such as "Experiment.network".
        part: The name of a part, a class or function, a `functools.partial`, or an instance.
        evaluated: Whether the parameter takes what the part makes, or the part itself.

    Raises:
        ValueError: The part has no name, or does not show what it was made with.
    """
    short = parameter.rpartition(".")[2]
    end = "()" if evaluated else ""
    arguments: dict[str, Any] = {}
    if isinstance(part, str):
        return [f"{parameter} = @{part.removeprefix('@').removesuffix('()')}{end}"]
    if isinstance(part, functools.partial):
        if part.args:
            raise ValueError(f"{short}: give the arguments of the partial by their names")
        arguments, part = dict(part.keywords), part.func
    elif not inspect.isclass(part) and not inspect.isroutine(part):
        arguments, part = _arguments_of(short, part), type(part)
    name = getattr(part, "__name__", "<lambda>")
    if not name.isidentifier():
        raise ValueError(f"{short}: it must be a class or a function with a name")
    if registered(name) is not part:
        # A cell of a notebook may have defined it before.
        with gin.unlock_config(), gin.config.interactive_mode():
            gin.external_configurable(part, name)
    given = [f"{name}.{argument} = {named(value)}" for argument, value in arguments.items()]
    return [f"{parameter} = @{name}{end}", *given]


def named(value: Any) -> str:
    """A value as gin reads it; a text that begins with @ or % is a reference."""
    if isinstance(value, str) and value[:1] in ("@", "%"):
        return value
    return repr(str(value)) if isinstance(value, Path) else repr(value)


def _arguments_of(short: str, instance: object) -> dict[str, Any]:
    """What an instance was made with, from its attributes."""
    found = {}
    for name, parameter in inspect.signature(type(instance)).parameters.items():
        value = getattr(instance, name, parameter)
        if not isinstance(value, (bool, int, float, str, list, tuple, type(None))):
            made = type(instance).__name__
            raise ValueError(
                f"{short}: this {made} does not show its {name} as a plain value; give its name, "
                f"{made!r}, and settings={{'{made}.{name}': …}}"
            )
        found[name] = value
    return found


def _arrays(path: Path) -> list[str]:
    return ["Experiment.dataset = @arrays()", f"arrays.path = {str(path)!r}"]


def _arrays_of(dataset: ImageDataset) -> dict[str, Any]:
    """The arrays from which `dd.data.arrays` makes the same dataset."""
    rows, labels = dataset.validation_rows, dataset.train_labels
    kept = torch.ones(len(labels), dtype=torch.bool)
    content: dict[str, Any] = {"class_names": np.array(dataset.class_names)}
    if rows is not None:
        kept[rows] = False
        content |= {"val_images": dataset.train_images[rows], "val_labels": labels[rows]}
    content |= {"train_images": dataset.train_images[kept], "train_labels": labels[kept]}
    content |= {"test_images": dataset.test_images, "test_labels": dataset.test_labels}
    return {name: _as_array(value) for name, value in content.items()}


def _collected(dataset: Any) -> dict[str, Any]:
    """The images [N, C, H, W] and labels of a dataset of pairs.

    Raises:
        ValueError: An item is no pair of a picture and a class; or the pictures differ in size.
    """
    images: list[Array] = []
    labels: list[Any] = []
    for index in range(len(dataset)):
        item = dataset[index]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise ValueError(
                f"dataset[{index}] is {_kind(item)}; it must be a pair (picture, class)"
            )
        images.append(_pixels(item[0], index))
        labels.append(_label(item[1], index))
        if images[-1].shape != images[0].shape:
            sizes = " and ".join(str(pixels.shape) for pixels in (images[0], images[-1]))
            raise ValueError(
                f"dataset has images of shapes {sizes}; all must be alike: convert and resize them"
            )
    if not images:
        raise ValueError("dataset is empty")
    content = {"images": np.stack(images), "labels": np.array(labels)}
    names = _class_names(dataset)
    if names is None or isinstance(labels[0], str):
        return content
    return {**content, "class_names": np.array(names)}


def _pixels(image: Any, index: int) -> Array:
    """One image of a dataset, [C, H, W]."""
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):  # of which white is found for all together
            return np.asarray(image)[None]
        return to_pixels(image, None).numpy()
    pixels = _as_array(image)
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.ndim != 3:
        raise ValueError(
            f"dataset[{index}]: its image is {_kind(image)} of shape {pixels.shape}; it must be a "
            "picture of Pillow's, a tensor [C, H, W] or an array [H, W, C]"
        )
    # A tensor has its channels first, and an array last, where the shape allows both.
    usual, other = (0, 2) if isinstance(image, torch.Tensor) else (2, 0)
    is_unusual = pixels.shape[usual] not in (1, 3, 4) and pixels.shape[other] in (1, 3, 4)
    return pixels if (other if is_unusual else usual) == 0 else np.moveaxis(pixels, -1, 0)


def _label(label: Any, index: int) -> int | str:
    """One class of a dataset: a whole number, also as a tensor or one-hot, or its name."""
    found = _as_array(label)
    if found.size > 1 and found.ndim == 1 and found.dtype.kind in "buif":
        is_one_hot = np.count_nonzero(found) == 1 and found.max() == 1
        found = np.array(found.argmax()) if is_one_hot else found
    value = found.item() if found.size == 1 else found
    if isinstance(value, str):
        return value
    if not isinstance(value, (bool, int, float)) or value % 1 != 0:
        raise ValueError(
            f"dataset[{index}]: its class is {label!r}; it must be a whole number or a name"
        )
    return int(value)


def _class_names(dataset: Any) -> list[str] | None:
    """The names that a dataset has, as torchvision's have, or the one that it is a part of."""
    names = getattr(dataset, "classes", None)
    if names is None and hasattr(dataset, "dataset"):
        return _class_names(dataset.dataset)
    if not isinstance(names, (list, tuple, dict)):
        return None
    return [str(name) for name in names] or None


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple) else "")


def _as_array(values: Any) -> Array:
    """A tensor, or whatever NumPy understands, as an array.

    Raises:
        ValueError: It understands it as objects, or not at all.
    """
    if isinstance(values, torch.Tensor):
        if values.is_meta:
            raise ValueError("dataset: a tensor on the device 'meta' has no values")
        values = values.detach().cpu()
        values = values.to_dense() if values.layout != torch.strided else values
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if isinstance(values, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in values):
        values = [_as_array(value) for value in values]
    try:
        found = np.asarray(values)
        if found.dtype == object and all(isinstance(value, str) for value in found.flat):
            found = found.astype(str)  # as pandas has names
    except (ValueError, TypeError) as error:
        raise ValueError(f"dataset: {_kind(values)} is no array: {error}") from error
    if found.dtype == object:
        raise ValueError(f"dataset: {_kind(values)} is no array of numbers or names")
    return found
