"""Any dataset of labelled pictures that torchvision has, by its name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import datasets

from bilevel.checks import check_flag, check_path, check_text
from dd.data.image_dataset import DatasetNotFoundError, ImageDataset
from dd.data.sources.named import Reading
from dd.runtime.changes import Judging

#: In torchvision, but not data by a name.
_MADE_UP_OR_FOLDERS = {"DatasetFolder", "FakeData", "ImageFolder", "VisionDataset"}
#: What a part may be called there, the first that there is.
_SPLITS = {
    "train": ("train", "trainval", "train-standard"),
    "test": ("test",),
    "validation": ("val", "valid", "validation"),
}


def torchvision(
    name: str,
    root: Judging[str | Path] = "data",
    download: Judging[bool] = True,
    variant: str | None = None,
    image_size: int | None = None,
    fit: str = "crop",
    background: str = "white",
    test_fraction: float = 0.1,
    seed: int = 0,
) -> ImageDataset:
    """A dataset of `torchvision.datasets`, such as SVHN, FashionMNIST, STL10 or Flowers102.

    Its training and test splits are used as they are, and so is a validation split; what has a
    validation split but no test set is tested on that, and of what has no splits a stratified part
    becomes the test set. Classes of which there is no training image are left out.

    Args:
        name: The name of the class, in any case.
        root: Where it is kept.
        download: Fetch the data into `root` if it is not there, where torchvision can.
        variant: What else the class must be given, such as "letters" of EMNIST.
        image_size: Height and width of the result; default: as they are, if all are of one size.
        fit: How a picture becomes square: "crop" keeps the centre, "pad" keeps all of it.
        background: The colour under transparent pixels, and around pictures that are padded.
        test_fraction: Share held out as test set if there is none, in (0, 1).
        seed: The same seed gives the same split.

    Raises:
        DatasetNotFoundError: The data is not there, and was not downloaded.
        ValueError: There is no such dataset, or it holds no pictures with one class each.
    """
    reading = Reading("torchvision", image_size, fit, background, test_fraction, seed)
    check_flag("download", download)
    if variant is not None:
        check_text("variant", variant)
    source = _named(name)
    parts = _parts(source, _opener(source, check_path("root", root), download, variant))
    images, labels = {}, {}
    for part, found in parts.items():
        described = f"{part} images of {source.__name__}"
        pairs = (found[index] for index in range(len(found)))
        images[part], found_labels = reading.gathered(pairs, described)
        labels[part] = _whole_numbers(found_labels, described)
    present = labels["train"].unique().tolist()
    names = getattr(parts["train"], "classes", None)
    return reading.dataset(
        source.__name__.lower(),
        images,
        {part: _renumbered(values, present, part) for part, values in labels.items()},
        [_class_name(names, label) for label in present],
    )


def _named(name: str) -> Any:
    known = {
        each.lower(): each
        for each in datasets.__all__
        if each not in _MADE_UP_OR_FOLDERS and isinstance(getattr(datasets, each), type)
    }
    found = known.get(name.lower()) if isinstance(name, str) else None
    if found is None:
        near = difflib.get_close_matches(str(name).lower(), known, n=1)
        hint = f"; did you mean {known[near[0]]!r}?" if near else ""
        raise ValueError(f"name={name!r}: torchvision has no dataset of that name{hint}")
    return getattr(datasets, found)


def _opener(source: Any, root: Path, download: bool, variant: str | None) -> Callable[..., Any]:
    """Opens a part; what the class must be given beside `root` is the variant."""
    parameters = inspect.signature(source).parameters
    options: dict[str, Any] = {"root": str(root)} if "root" in parameters else {}
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in ("root", "train")
    ]
    if len(needed) > (variant is not None):
        raise ValueError(
            f"name={source.__name__!r}: it needs a value for {', '.join(needed)}; "
            "say torchvision.variant"
        )
    if variant is not None:
        option = needed[0] if needed else "split"
        takes_any = any(each.kind == each.VAR_KEYWORD for each in parameters.values())
        if option not in parameters and not takes_any:
            raise ValueError(f"variant={variant!r}: torchvision's {source.__name__} has none")
        options[option] = variant
    attempts = (False, True) if download else (False,)

    def opened(**which: Any) -> Any:
        reason: Exception | None = None
        for attempt in attempts if "download" in parameters else (None,):
            given = {} if attempt is None else {"download": attempt}
            try:
                return source(**options, **which, **given)
            except (RuntimeError, OSError) as error:
                reason = error
            except (ImportError, TypeError, AttributeError) as error:
                raise ValueError(f"torchvision's {source.__name__}: {error}") from error
        raise DatasetNotFoundError.looked_in(
            root, f"{source.__name__}", f"torchvision says: {reason}"
        ) from reason

    return opened


def _parts(source: Any, opened: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(source).parameters
    takes_any = any(each.kind == each.VAR_KEYWORD for each in parameters.values())
    if "train" in parameters or (takes_any and "split" in parameters and _is_mnist(source)):
        return {"train": opened(train=True), "test": opened(train=False)}
    if "split" not in parameters:
        return {"train": opened()}
    parts = {part: _first(opened, names) for part, names in _SPLITS.items()}
    if parts["train"] is None:
        raise ValueError(f"torchvision's {source.__name__} has no training split")
    return {part: found for part, found in parts.items() if found is not None}


def _is_mnist(source: Any) -> bool:
    return issubclass(source, datasets.MNIST)


def _first(opened: Callable[..., Any], names: Sequence[str]) -> Any:
    """The first split of these names that there is."""
    for name in names:
        try:
            return opened(split=name)
        except ValueError:  # torchvision's word for a split of another name
            continue
    return None


def _whole_numbers(labels: Sequence[Any], described: str) -> Tensor:
    try:
        numbers = torch.tensor([int(label) for label in labels])
        exact = all(number == label for number, label in zip(numbers.tolist(), labels, strict=True))
    except (TypeError, ValueError, RuntimeError):
        exact = False
    if not exact:
        raise ValueError(f"the labels of the {described} are no classes: {labels[0]!r}")
    return numbers


def _renumbered(labels: Tensor, present: Sequence[int], part: str) -> Tensor:
    """Labels by their place among those of the training images."""
    known = torch.tensor(present)
    strange = labels[~torch.isin(labels, known)]
    if len(strange):
        raise ValueError(f"no training image has class {int(strange[0])}, which {part} images have")
    return torch.searchsorted(known, labels)


def _class_name(names: Any, label: int) -> str:
    if isinstance(names, (list, tuple)) and 0 <= label < len(names):
        name = names[label]
        return str(name[0] if isinstance(name, (list, tuple)) and name else name)
    return str(label)
