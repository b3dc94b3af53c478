"""Model files: Diffusers folder to single file and back, LoRA names, and what a file is; streamed and verified."""

from fastsd_helpers.checkpoints.converter import convert
from fastsd_helpers.checkpoints.inspector import Inspection, inspect
from fastsd_helpers.checkpoints.models.verifier import verify_checkpoint
from fastsd_helpers.checkpoints.models.writer import CheckpointFile, write_checkpoint

__all__ = ["CheckpointFile", "Inspection", "convert", "inspect", "verify_checkpoint", "write_checkpoint"]
