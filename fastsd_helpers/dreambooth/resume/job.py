"""Job: a generation on its way to the mount."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.dreambooth.resume.generation import FileEntry, describe
from fastsd_helpers.errors import FastSDError

__all__ = ["Job"]


@dataclass
class Job:
    """What is to be copied, and what went wrong with it last.

    Attributes:
        spare_bytes: room that must be left on a Drive for what comes after it.
    """

    name: str
    files: tuple[FileEntry, ...]
    record: dict[str, Any]
    keep: bool
    problem: FastSDError | None = None
    spare_bytes: int = 0

    def not_written(self, folder: Path, scratch: Path) -> str:
        """Why it is not in the folder, and where it is instead, as a sentence."""
        why = self.problem.problem if self.problem is not None else "It has not been tried yet."
        return (
            f"Checkpoint {describe(self.name)} was not written to {folder}: {why} "
            f"It is in {scratch} until this machine is gone."
        )
