"""The checkpoints of a fine-tuning, as transformers' trainer writes them: which is complete, and its weights."""

import json
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import TrainingFailed
from fastsd_helpers.inert import require_inert
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.model.checkpoint import load_weights

__all__ = ["copy_weights", "last_whole_checkpoint"]


def copy_weights(folder: str, model: Any) -> None:
    """Give `model` the weights of a checkpoint, every one of them, as from_pretrained understands their names."""
    fresh, missing = load_weights(folder)
    if missing:
        raise TrainingFailed(f"{folder} lacks weights: {', '.join(missing[:3])}.", "Start again with --restart.")
    model.load_state_dict(fresh.state_dict())


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of which every part is there; one that a kill cut short is passed over."""
    if not folder.is_dir():
        return None
    needed = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
    found = [path for path in folder.glob("checkpoint-*") if path.name.rsplit("-", 1)[1].isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name.rsplit("-", 1)[1])):
        weights = [*path.glob("*.safetensors")]
        if weights and all((path / name).is_file() for name in needed) and _opens(path, weights):
            return path
        logger.warning("%s is incomplete and was skipped.", path.name)
    return None


# What transformers' trainer opens when it resumes.
_RESUMED = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")


def _opens(path: Path, weights: list[Path]) -> bool:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        require_inert([path, *(path / name for name in _RESUMED if (path / name).is_file())])
        torch.load(path / "optimizer.pt", weights_only=True, map_location="meta")
        for file in weights:
            with safe_open(str(file), framework="pt"):
                pass
    except (OSError, ValueError, RuntimeError, SafetensorError, EOFError):
        return False
    return True
