"""Where what is costly to make is kept between runs, and how it is recognised."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import platformdirs
import torch
from torch import Tensor

#: The environment variable that moves the cache.
VARIABLE = "DD_CACHE"


def cache_folder(chosen: str | Path | None = None) -> Path:
    """The folder of cached files; it may be deleted at any time.

    Args:
        chosen: Where the user wants it. None: where the environment variable `DD_CACHE` says,
            or else where the platform keeps caches, such as `~/.cache/bilevel-dd` on Linux.
    """
    folder = chosen or os.environ.get(VARIABLE)
    return Path(folder).expanduser() if folder else platformdirs.user_cache_path("bilevel-dd")


def checksum(parts: Iterable[str | Tensor]) -> str:
    """SHA-256 of texts and of tensors with their shapes and dtypes, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(f"text {len(part)} {part}".encode())
        else:
            digest.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            flat = part.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)  # NumPy has no bfloat16
    return digest.hexdigest()
