"""Image files on disk: the tree of one folder a class."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dd.data.image_dataset import DatasetNotFoundError
from dd.data.pictures import decode_image, is_leftover, is_picture, summary

__all__ = ["check_same_classes", "decode_image", "list_class_folders"]

_log = logging.getLogger(__name__)


def list_class_folders(
    directory: Path, root: Path, layout: str
) -> tuple[list[str], Tensor, tuple[str, ...]]:
    """Paths, labels (int64) and class names of the images below one folder a class, all sorted.

    What tools leave behind, such as `.ipynb_checkpoints`, `._1.png`, `Thumbs.db` and `__MACOSX`,
    is neither class nor image. What is no picture is left out, too; one line says how much.

    Args:
        directory: The folder of class folders.
        root: What an error says was looked in.
        layout: What an error says was expected there.

    Raises:
        DatasetNotFoundError: There is no such folder, or a class is empty.
        ValueError: A picture is a pipe, or a link that leads nowhere or in a circle.
    """
    skipped: list[str] = []
    try:
        names = []
        for name in sorted(os.listdir(directory)):
            if os.path.isdir(directory / name) and not is_leftover(name):
                names.append(name)
            else:
                skipped.append(_kind(name))
        if not names:
            raise FileNotFoundError(f"couldn't find any class folder in {directory}")
        _check_level(directory, names)
        by_class = [list(_pictures(str(directory / name), skipped)) for name in names]
        empty = [name for name, found in zip(names, by_class, strict=True) if not found]
        if empty:
            raise FileNotFoundError(
                f"found no valid file for the classes {', '.join(empty)}"
                + (f"; skipped {summary(skipped)}" if skipped else "")
            )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DatasetNotFoundError.looked_in(
            root, layout, f"arrange the image files so ({error})"
        ) from error
    if skipped:
        _log.warning(
            "note: in %s, %d files and folders that are no pictures were skipped: %s",
            directory,
            len(skipped),
            summary(skipped),
        )
    paths = [path for found in by_class for path in found]
    counts = torch.tensor([len(found) for found in by_class])
    return paths, torch.arange(len(names)).repeat_interleave(counts), tuple(names)


def check_same_classes(
    root: Path, names: tuple[str, ...], test_names: tuple[str, ...], test_folder: str
) -> None:
    """Raise `ValueError` unless `train/` and the test folder have the same classes."""
    different = sorted(set(names) ^ set(test_names))
    if different:
        raise ValueError(
            f"{root.absolute()}: train/ and {test_folder}/ must have the same classes; "
            f"only one of them has {different[0]!r}"
        )


def _check_level(directory: Path, names: list[str]) -> None:
    """Raise `ValueError` where the classes seem to be one level below, as in `images/cat/1.png`."""
    inside = {name: _class_folders(directory / name) for name in names}
    first = inside[names[0]]
    are_splits = all(re.search("train|test|val", name.lower()) for name in names)
    if len(first) < 2 or any(found != first for found in inside.values()):
        return
    if len(names) > 1 and not are_splits:
        return
    raise ValueError(
        f"{directory}: {', '.join(names[:4])} {'each hold' if len(names) > 1 else 'holds'} no "
        f"picture but the folders {', '.join(first[:4])}; if these are the classes, "
        + (
            "call the folders of the splits train/, test/ and val/"
            if len(names) > 1
            else f"give {directory / names[0]}"
        )
    )


def _class_folders(folder: Path) -> list[str]:
    """The folders in a folder that holds no picture itself; else nothing."""
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_leftover(entry.name):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif is_picture(entry.name):
                return []
    return sorted(folders)


def _pictures(class_folder: str, skipped: list[str]) -> Iterator[str]:
    """The pictures below a folder, links followed, folder by folder in the order of their names."""
    found: list[tuple[str, list[str]]] = []
    above: tuple[str, ...] = (os.path.realpath(class_folder),)
    waiting = [(class_folder, above)]
    while waiting:
        folder, above = waiting.pop()
        here = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_leftover(entry.name):
                    skipped.append(_kind(entry.name))
                elif entry.is_dir():
                    real = os.path.realpath(entry.path)
                    if real in above:
                        raise ValueError(f"{entry.path} is a link that leads in a circle")
                    waiting.append((entry.path, (*above, real)))
                elif is_picture(entry.name):
                    if not _is_file(entry):
                        raise ValueError(
                            f"{entry.path} is no regular file: a pipe, or a link that leads nowhere"
                        )
                    here.append(entry.name)
                else:
                    skipped.append(_kind(entry.name))
        found.append((folder, sorted(here)))
    for folder, names in sorted(found):
        for name in names:
            yield os.path.join(folder, name)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # links that lead in a circle
        return False


def _kind(name: str) -> str:
    """What a skipped file is counted as."""
    if is_leftover(name):
        return name if len(name) < 24 and not name.startswith("._") else "hidden files"
    return os.path.splitext(name)[1].lower() or name
