"""Checkpoints of a training run that survive a kill at any instant and a mount that loses, cuts or reorders files."""

from fastsd_helpers.dreambooth.resume.generation import Generation, Snapshot
from fastsd_helpers.dreambooth.resume.store import CheckpointStore

__all__ = ["CheckpointStore", "Generation", "Snapshot"]
