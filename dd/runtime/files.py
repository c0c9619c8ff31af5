"""Reading and writing the files of a run: atomic writes, clear errors, no pickle."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

#: How a file is called while it is being written: hidden, and by no name that a user would give.
_UNFINISHED = ".unfinished"


class DamagedFileError(ValueError):
    """A file of a run is truncated, corrupt, or not what it should be."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that at every moment either the old or the new content is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(_UNFINISHED, f".{path.name}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left half written in a folder and those below it.

    Only the one writer of a folder may call this.
    """
    for leftover in folder.rglob(f".*{_UNFINISHED}"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def write_text(path: Path, content: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, indented for people."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        DamagedFileError: The file is no JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedFileError(f"{path} is not valid JSON: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able metadata to a safetensors file, atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(plain, {"dd": json.dumps(dict(metadata))}))


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A memory-mapped safetensors file that `write_tensors` wrote, and its metadata.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedFileError: It is truncated, corrupt, or was written by something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.absolute()} does not exist")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["dd"])
            if not isinstance(metadata, dict):
                raise KeyError("its metadata is no table")
            yield file, metadata
    except (SafetensorError, json.JSONDecodeError, KeyError, OSError) as error:
        raise DamagedFileError(
            f"{path} is damaged or was not written by this program: {error}"
        ) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote, on the CPU; errors as of `open_tensors`."""
    with open_tensors(path) as (file, metadata):
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
