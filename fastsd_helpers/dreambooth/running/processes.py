"""How many processes share a training: one on each GPU, or as many as are asked for; said with the reason."""

from dataclasses import dataclass
from typing import Any

from fastsd_helpers.dreambooth.settings import DreamBoothConfig, given_values
from fastsd_helpers.dreambooth.training.segments import segments_in
from fastsd_helpers.processes import choose_count, count_gpus, world_here
from fastsd_helpers.sessions import Session

__all__ = ["Processes", "choose_processes"]


@dataclass(frozen=True)
class Processes:
    """How many there are, and what a user should know about that."""

    count: int
    reason: str = ""


def choose_processes(
    config: DreamBoothConfig, session: Session, *, restart: bool = False, more: bool = False
) -> Processes:
    """Choose the number of processes before anything is loaded, see `choose_count`.

    Args: restart, more: whether the run is begun anew, or a finished one is gone on with.

    Raises:
        SettingsError: there are fewer GPUs, or they cannot share the steps of the run equally.
    """
    gpus, asked = count_gpus(), given_values(config).get("processes")
    parts, before = (None, None) if restart else _begun(session.record, given_values(config) if more else {})
    count, idle = choose_count(asked, gpus, package="dreambooth", parts=parts, before=before)
    if idle:
        return Processes(count, idle)
    shared = bool(asked) or world_here() > 1
    return Processes(count, _reason(config, count, gpus=gpus, asked=shared, parts=parts))


def _begun(record: dict[str, Any], changes: dict[str, Any]) -> tuple[int | None, int | None]:
    """The parts of each step of the run that has begun, and the processes that were asked for then."""
    if "run" not in record:
        return None, None
    before = (record.get("given") or {}).get("processes")
    segments = segments_in(record) if (record.get("progress") or {}).get("step") else []
    if not segments:
        return None, before
    last = segments[-1]
    return last.parts // last.accumulation * changes.get("accumulation", last.accumulation), before


def _reason(config: DreamBoothConfig, count: int, *, gpus: int, asked: bool, parts: int | None) -> str:
    if count == 1:
        if gpus > 1 and not asked:
            each = parts or 1
            return (
                f"1 of {gpus} GPUs is used: each step of this run has {each} forward pass{'es' * (each > 1)}, as it "
                "was begun."
            )
        return ""
    where = f"on {count} of {gpus} GPUs" if gpus else "on the CPU"
    said = f"{count} processes {where}, which share the forward passes of each optimizer step"
    if parts:
        return f"{said}."
    halve = ", ".join(
        f"--{name.replace('_', '-')} {max(1, steps // count)}"
        for name in ("unet_steps", "text_encoder_steps")
        if (steps := getattr(config, name))
    )
    less = f"{halve}" if halve else f"steps divided by {count}"
    if config.steps == "auto" or config.preset != "none":
        return f"{said}: a step sees {count} times the images, and steps that are not set follow that."
    return f"{said}. The steps stay; each sees {count} times the images. For the same work: {less}."
