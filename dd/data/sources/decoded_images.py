"""Image files decoded once: later runs memory-map the result."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.lib.format import open_memmap
from torch import Tensor
from tqdm import tqdm

from dd.data.pictures import decode_image, survey
from dd.runtime.cache import VARIABLE, cache_folder, checksum
from dd.runtime.files import DamagedFileError, read_json, write_json

#: Changes when the same files are decoded to other pixels.
FORMAT = "dd-decoded-images-4"

_FILES_AT_A_TIME = 1024
_log = logging.getLogger(__name__)


def decoded_images(
    paths: Sequence[str], root: Path, image_size: int, name: str, chosen_folder: str | Path | None
) -> Tensor:
    """Images from a memory-mapped file, which is made on the first call.

    It lies in the cache, below a name that holds a checksum of the files' paths, sizes and times of
    change, beside a manifest of what it must hold, with a checksum. If the two disagree, that is
    said, and the images are decoded again.

    Args:
        paths: The image files, below `root`.
        root: Paths relative to it, not where it lies, tell one set of files from another.
        image_size: Height and width of the result.
        name: What the cached files are called.
        chosen_folder: Of the cache; None for the default.

    Returns:
        uint8 [N, 3, image_size, image_size], read from the file when it is indexed; not writable.

    Raises:
        ValueError: An image cannot be decoded; the message names it.
        OSError: The cache cannot be written, or its disk has too little space.
    """
    shape = (len(paths), 3, image_size, image_size)
    below = f"{root}{os.sep}"
    listing = checksum(f"{path.removeprefix(below)} {_version(path)}" for path in paths)
    folder = cache_folder(chosen_folder) / "images" / f"{name}-{image_size}-{listing[:16]}"
    array, manifest = folder / "images.npy", folder / "manifest.json"
    expected = {"format": FORMAT, "files": listing, "shape": list(shape)}
    with contextlib.suppress(OSError, DamagedFileError):
        return _open(array, manifest, expected)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_process(folder / "lock", name):
            if manifest.exists():
                try:
                    return _open(array, manifest, expected)
                except (OSError, DamagedFileError) as error:
                    _log.warning("warning: decoding the images again, because %s", error)
                manifest.unlink()
                array.unlink(missing_ok=True)  # there may be no room for two of them
            _decode(paths, array, shape, name)
            facts = {"bytes": array.stat().st_size, "crc32": _crc32(open_memmap(array, mode="r"))}
            write_json(manifest, {**expected, **facts})
            return _open(array, manifest, expected)
    except OSError as error:
        raise OSError(
            f"the decoded images of {name} cannot be kept in {folder}: {error}; choose another "
            f"place by cache_folder, or by the environment variable {VARIABLE}"
        ) from error


@contextlib.contextmanager
def _only_process(path: Path, name: str) -> Iterator[None]:
    """Wait until no other process is in here."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        _log.warning("waiting for another process, which is decoding %s", name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _open(array: Path, manifest: Path, expected: dict[str, Any]) -> Tensor:
    found = read_json(manifest)
    if not isinstance(found, dict) or {name: found.get(name) for name in expected} != expected:
        raise DamagedFileError(f"the manifest beside {array} describes other images")
    size, wanted = array.stat().st_size, found.get("bytes")
    if size != wanted:
        raise DamagedFileError(f"{array} has {size} bytes, not {wanted}")
    try:
        images = open_memmap(array, mode="r")
    except ValueError as error:
        raise DamagedFileError(f"{array} is no array: {error}") from error
    if images.dtype != np.uint8 or list(images.shape) != expected["shape"]:
        raise DamagedFileError(f"{array} holds {images.dtype} {images.shape}")
    if _crc32(images) != found.get("crc32"):
        raise DamagedFileError(f"{array} does not have the checksum that it was written with")
    with warnings.catch_warnings():
        # Torch warns that the memory is not writable. A mapping that is would need as much memory
        # to be free as the file is large.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(images)


def _version(path: str) -> str:
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"


def _crc32(images: Any) -> list[int]:
    """A checksum of every so many images, read by several threads: gigabytes in a second."""
    starts = range(0, len(images), _FILES_AT_A_TIME)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        parts = (images[start : start + _FILES_AT_A_TIME] for start in starts)
        return list(threads.map(zlib.crc32, parts))


def _decode(paths: Sequence[str], array: Path, shape: tuple[int, ...], name: str) -> None:
    size, free = int(np.prod(shape)), shutil.disk_usage(array.parent).free
    if size > free:
        # Writing to a mapped file on a full disk kills the process without a word.
        raise OSError(f"it takes {size / 1e9:.1f} GB and there are {free / 1e9:.1f} GB")
    # Under one name, so that what a killed process leaves behind is overwritten by the next.
    temporary = array.with_suffix(".partial")
    white = survey(paths)
    read = decode_image if white is None else partial(decode_image, white=white)
    try:
        images = open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        # disable=None: no bar where the output is not a terminal.
        bar = tqdm(total=len(paths), desc=f"decoding {name}", unit="image", disable=None)
        with bar, ThreadPoolExecutor(os.cpu_count()) as threads:
            for start in range(0, len(paths), _FILES_AT_A_TIME):
                part = paths[start : start + _FILES_AT_A_TIME]
                decoded = threads.map(lambda path: read(path, shape[-1]).numpy(), part)
                for index, image in enumerate(decoded, start):
                    images[index] = image
                    bar.update()
        images.flush()
        del images
        os.replace(temporary, array)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
