"""What a finished run made."""

import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["TrainResult", "result_from"]


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


def result_from(answer: Mapping[str, Any]) -> TrainResult:
    """The result as another process's own `train` returned it: the command prints every field of it."""
    kinds = typing.get_type_hints(TrainResult)
    values: dict[str, Any] = {}
    for item in fields(TrainResult):
        if item.name in answer:
            value = answer[item.name]
            values[item.name] = Path(value) if kinds[item.name] is Path else value
    return TrainResult(**values)
