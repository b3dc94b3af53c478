"""What a finished run made."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["TrainResult"]


@dataclass(frozen=True)
class TrainResult:
    """What a finished run made."""

    path: Path  # the finished .safetensors, read back and verified
    sha256: str
    grid: Path  # before and after, same seeds
    loss_plot: Path
    model_card: Path
    loss_before: float  # held-out loss of the base model
    loss_after: float
    first_step: int  # steps that were already done when this call began
    steps: int
    seconds: float
    best_checkpoint: str | None = None  # its name, when an earlier one has a lower held-out loss than the end
