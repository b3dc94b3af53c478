"""Model files: Diffusers folder to single file and back, LoRA names, and what a file is; streamed and verified.

The public names are loaded when they are first used, so that importing this package needs the standard library alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsd_helpers.checkpoints.converter import convert
    from fastsd_helpers.checkpoints.inspector import Inspection, inspect
    from fastsd_helpers.checkpoints.models.verifier import verify_checkpoint
    from fastsd_helpers.checkpoints.models.writer import CheckpointFile, write_checkpoint

__all__ = ["CheckpointFile", "Inspection", "convert", "inspect", "verify_checkpoint", "write_checkpoint"]

_HOMES = {
    "CheckpointFile": "models.writer",
    "Inspection": "inspector",
    "convert": "converter",
    "inspect": "inspector",
    "verify_checkpoint": "models.verifier",
    "write_checkpoint": "models.writer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
