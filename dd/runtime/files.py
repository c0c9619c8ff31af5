"""Reading and writing the files of a run: atomic writes, checksums, clear errors, no pickle."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dd.runtime.cache import checksum

#: What a checksum is called in the files.
_SHA256 = "sha256"
#: How a file is called while it is being written: hidden, and by no name that a user would give.
_UNFINISHED = ".unfinished"
# What new files of this process are closed to; it can only be read by setting it.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


class DamagedFileError(ValueError):
    """A file of a run is truncated, corrupt, or not what it should be."""


def write_bytes(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Write a file so that at every moment either the old or the new content is there.

    Args:
        path: The file.
        content: All of it.
        previous: What the old content is called afterwards; default: it is lost.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(_UNFINISHED, f".{path.name}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
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
    # The name of a file may have bytes that are no UTF-8; JSON then has them as it writes them.
    write_bytes(path, content.encode(errors="backslashreplace"))


def write_sealed(path: Path, text: str) -> None:
    """Write text behind a first line, a comment, that holds its checksum."""
    write_text(path, f"# {_SHA256} {_of_text(text)}\n{text}")


def read_sealed(path: Path) -> str:
    """The text that `write_sealed` wrote, or one without a checksum.

    Raises:
        DamagedFileError: The text does not have the checksum of its first line.
    """
    try:
        whole = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error
    first, _, text = whole.partition("\n")
    if _SHA256 not in first and not re.search("[0-9a-f]{64}", first):
        return whole
    if first != f"# {_SHA256} {_of_text(text)}":
        raise DamagedFileError(
            f"{path} is damaged: it does not have the checksum that it was written with; if you "
            "changed it, remove its first line"
        )
    return text


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a table as JSON with a checksum, atomically, indented for people."""
    table = json.loads(json.dumps(dict(content), allow_nan=False))
    sealed = {**table, _SHA256: _of_table(table)}
    write_text(path, json.dumps(sealed, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON, without the checksum that `write_json` gave it.

    Raises:
        DamagedFileError: The file is no JSON, or does not have its checksum.
    """
    try:
        text = path.read_text("utf-8")
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is not valid JSON: {error}") from error
    if isinstance(found, dict) and _is_sealed(text):
        expected = found.pop(_SHA256, None)
        if expected != _of_table(found):
            raise DamagedFileError(
                f"{path} is damaged: it does not have the checksum that it was written with"
            )
    return found


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    previous: Path | None = None,
) -> None:
    """Write tensors and JSON-able metadata to a safetensors file with a checksum, atomically.

    Args:
        path: The file.
        tensors: By name.
        metadata: JSON-able.
        previous: See `write_bytes`.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sealed = {**metadata, _SHA256: _of_tensors(plain, metadata)}
    # One entry, since safetensors writes several in a random order.
    write_bytes(path, save(plain, {"dd": json.dumps(sealed)}), previous)


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
            metadata.pop(_SHA256, None)
            yield file, metadata
    except (SafetensorError, json.JSONDecodeError, KeyError, OSError) as error:
        raise DamagedFileError(
            f"{path} is damaged or was not written by this program: {error}"
        ) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote, on the CPU, and compare its checksum, if it has one.

    Raises:
        FileNotFoundError, DamagedFileError: As `open_tensors`; or the checksum is another.
    """
    with open_tensors(path) as (file, metadata):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        described = file.metadata()["dd"]
    if _is_sealed(described) and json.loads(described).get(_SHA256) != _of_tensors(
        tensors, metadata
    ):
        raise DamagedFileError(
            f"{path} is damaged: it does not have the checksum that it was written with"
        )
    return tensors, metadata


def _is_sealed(table: str) -> bool:
    """Whether JSON has a checksum: one whose name, or value, is damaged is still the last entry."""
    end = table[-200:]
    return _SHA256 in end or re.search(r'"[0-9a-f]{64}"\s*}\s*$', end) is not None


def _of_text(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()


def _of_table(table: Mapping[str, Any]) -> str:
    return _of_text(json.dumps(table, sort_keys=True))


def _of_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    named = (part for name in sorted(tensors) for part in (name, tensors[name]))
    return checksum([json.dumps(dict(metadata)), *named])
