"""What somebody gives in Python, as gin bindings: a dataset, a network, a schedule."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

import gin
from dd.data import ImageDataset
from dd.gin_text import nearest, registered, registered_names

#: What can be distilled.
Data = str | Path | ImageDataset | tuple[Any, Any] | Dataset[Any]


def dataset_bindings(dataset: Data, folder: Path, image_size: int) -> list[str]:
    """Bindings of `Experiment.dataset`; what has no path is first written into `folder`.

    Raises:
        FileNotFoundError: It is a path, and nothing is there.
        ValueError: It is nothing that can be distilled.
    """
    if isinstance(dataset, (str, Path)):
        path = Path(dataset).expanduser()
        if path.is_dir():
            root = f"image_folder.root = {str(path.absolute())!r}"
            size = f"image_folder.image_size = {image_size!r}"
            return ["Experiment.dataset = @image_folder()", root, size]
        if path.is_file():
            return _arrays(path.absolute())
        if isinstance(dataset, str) and registered(dataset) is not None:
            return [f"Experiment.dataset = @{dataset}()"]
        raise FileNotFoundError(
            f"dataset={str(dataset)!r}: there is no such folder, no such file and no such "
            f"dataset{nearest(str(dataset), [n for n in registered_names() if n.islower()])}"
        )
    if isinstance(dataset, ImageDataset):
        # The dataset is called like the file.
        path = folder / f"{dataset.name.replace('/', '_')}.npz"
        content = _arrays_of(dataset)
        first = ["arrays.channels = 'first'"]
    elif isinstance(dataset, tuple) and len(dataset) == 2:
        path, first = folder / "dataset.npz", []
        content = dict(zip(("images", "labels"), map(_as_array, dataset), strict=True))
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        path, first = folder / "dataset.npz", ["arrays.channels = 'first'"]
        content = _collected(dataset)
    else:
        raise ValueError(
            f"dataset={type(dataset).__name__}: it must be a path, the name of a dataset, an "
            "ImageDataset, a pair (images, labels), or a torch Dataset of pairs"
        )
    _keep(path, content)
    return [*_arrays(path.absolute()), *first]


def _keep(path: Path, content: dict[str, Any]) -> None:
    """Write the arrays of a run; a run that is resumed has them already."""
    if path.is_file():
        with np.load(path, allow_pickle=False) as before:
            same = before.files == list(content) and all(
                np.array_equal(before[name], value) for name, value in content.items()
            )
        if not same:
            raise ValueError(f"{path} holds other data: choose another run_dir")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **content)


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
    """The images [N, C, H, W] and labels of a dataset of pairs."""
    images, labels = [], []
    for index in range(len(dataset)):
        image, label = dataset[index]
        pixels = _as_array(image)
        if not isinstance(image, torch.Tensor):  # a picture: [H, W] or [H, W, C]
            pixels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
        images.append(pixels)
        labels.append(int(label))
    content = {"images": np.stack(images), "labels": np.array(labels)}
    names = getattr(dataset, "classes", None)
    return content if names is None else {**content, "class_names": np.array(list(names))}


def _as_array(values: Any) -> np.ndarray[Any, Any]:
    return np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
