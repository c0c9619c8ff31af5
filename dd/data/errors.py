"""Errors raised while loading data."""

from __future__ import annotations

from pathlib import Path
from typing import final

__all__ = ["DatasetNotFoundError"]


@final
class DatasetNotFoundError(FileNotFoundError):
    """A dataset is not where it was looked for; the message says where, for what and what to do."""

    @classmethod
    def looked_in(cls, directory: Path, expected: str, remedy: str) -> DatasetNotFoundError:
        """Build the error.

        Args:
            directory: where the data was looked for; shown as an absolute path.
            expected: what should have been there.
            remedy: what the user can do about it.
        """
        return cls(f"looked in {directory.absolute()} for {expected}; {remedy}")
