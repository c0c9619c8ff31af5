"""Whitening that is fitted once: later runs on the same images read it from the cache."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from bilevel.checks import check_integer, check_number, check_path
from dd.data.transforms.base import PixelTransform
from dd.data.transforms.kip import KIPWhitening
from dd.data.transforms.low_rank import LowRankKIP, LowRankZCA
from dd.data.transforms.moments import MAX_DIMENSION
from dd.data.transforms.zca import ZCAWhitening
from dd.runtime.cache import cache_folder as find_cache_folder
from dd.runtime.cache import checksum
from dd.runtime.changes import Anytime
from dd.runtime.files import DamagedFileError, read_tensors, write_tensors

#: Changes when a fit gives other numbers from the same images and parameters.
FORMAT = "dd-fitted-transform-1"

_log = logging.getLogger(__name__)
_Transform = TypeVar("_Transform", bound=PixelTransform)


def zca_whitening(
    images: Tensor,
    *,
    epsilon: float = 0.1,
    chunk: int = 1000,
    max_dimension: int = MAX_DIMENSION,
    cache_folder: Anytime[str | Path | None] = None,
    rank: int | None = None,
) -> ZCAWhitening | LowRankZCA:
    """`ZCAWhitening.fit`, remembered; with a `rank`, `LowRankZCA` of it.

    Args:
        images: The training images [N, C, H, W], uint8, or floating point in [0, 1].
        epsilon: See `ZCAWhitening.fit`, as for the next two.
        chunk: Images per step.
        max_dimension: Largest C·H·W to accept.
        cache_folder: Where fitted transforms are kept; default: see
            `dd.runtime.cache.cache_folder`.
        rank: How many directions are whitened each by its own factor, all others by
            a common one, so that the transform is small enough to travel with a set; default: all.

    Raises:
        ValueError: An argument is not allowed.
    """
    epsilon = check_number("epsilon", epsilon, above=0)
    _check(chunk, max_dimension, cache_folder)

    def fit() -> ZCAWhitening:
        return ZCAWhitening.fit(images, epsilon=epsilon, chunk=chunk, max_dimension=max_dimension)

    full = _remembered(ZCAWhitening, fit, images, {"epsilon": epsilon}, cache_folder)
    return full if rank is None else LowRankZCA.of(full, rank)


def kip_whitening(
    images: Tensor,
    *,
    regularization: float = 0.1,
    chunk: int = 1000,
    max_dimension: int = MAX_DIMENSION,
    cache_folder: Anytime[str | Path | None] = None,
    rank: int | None = None,
) -> KIPWhitening | LowRankKIP:
    """`KIPWhitening.fit`, remembered; with a `rank`, `LowRankKIP` of it.

    Args:
        images: The training images [N, C, H, W], uint8, or floating point in [0, 1].
        regularization: See `KIPWhitening.fit`, as for the next two.
        chunk: Images per step.
        max_dimension: Largest C·H·W to accept.
        cache_folder: Where fitted transforms are kept; default: see
            `dd.runtime.cache.cache_folder`.
        rank: How many directions are whitened each by its own factor, all others by
            a common one, so that the transform is small enough to travel with a set; default: all.

    Raises:
        ValueError: An argument is not allowed.
    """
    regularization = check_number("regularization", regularization, above=0)
    _check(chunk, max_dimension, cache_folder)

    def fit() -> KIPWhitening:
        return KIPWhitening.fit(
            images, regularization=regularization, chunk=chunk, max_dimension=max_dimension
        )

    parameters = {"regularization": regularization}
    full = _remembered(KIPWhitening, fit, images, parameters, cache_folder)
    return full if rank is None else LowRankKIP.of(full, rank)


def _check(chunk: int, max_dimension: int, folder: str | Path | None) -> None:
    """Also where a fit is found in the cache, which needs none of these."""
    check_integer("chunk", chunk)
    check_integer("max_dimension", max_dimension)
    if folder is not None:
        check_path("cache_folder", folder)


def _remembered(
    transform_class: type[_Transform],
    fit: Callable[[], _Transform],
    images: Tensor,
    parameters: Mapping[str, float],
    folder: str | Path | None,
) -> _Transform:
    name = checksum([FORMAT, json.dumps(parameters, sort_keys=True), images])
    path = find_cache_folder(folder) / "transforms" / f"{transform_class.kind}-{name}.safetensors"
    try:
        state = _read(path)
        return transform_class.from_state({n: v.to(images.device) for n, v in state.items()})
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        _log.warning("warning: fitting the whitening again, because %s", error)
    transform = fit()
    try:
        state = transform.state()
        write_tensors(path, state, {"format": FORMAT, "checksum": _checksum(state)})
    except OSError as error:
        _log.warning("warning: the fitted whitening is not kept for the next run: %s", error)
    return transform


def _read(path: Path) -> dict[str, Tensor]:
    state, metadata = read_tensors(path)
    if metadata.get("checksum") != _checksum(state):
        raise DamagedFileError(f"{path} does not have the checksum that it was written with")
    return state


def _checksum(state: Mapping[str, Tensor]) -> str:
    return checksum(part for name in sorted(state) for part in (name, state[name]))
