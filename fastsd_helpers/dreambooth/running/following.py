"""What every process of a training but the first does: its parts of the same steps, in the same order of events.

It decides and writes nothing. The first one hands it what it has found out, and it waits while that one evaluates,
samples or saves. What both do is here too.
"""

import threading
from dataclasses import dataclass, replace
from typing import Any

from fastsd_helpers.device import Device, describe_device
from fastsd_helpers.dreambooth.prior.own_class_images import ClassImages
from fastsd_helpers.dreambooth.results.finishing import TrainResult
from fastsd_helpers.dreambooth.resume import Generation
from fastsd_helpers.dreambooth.settings import PlannedConfig
from fastsd_helpers.dreambooth.training.base_model import BaseModel
from fastsd_helpers.dreambooth.training.beginning import Start
from fastsd_helpers.dreambooth.training.optimizers import lr_factor_in_legs
from fastsd_helpers.dreambooth.training.segments import STAGE_NAMES, Leg
from fastsd_helpers.dreambooth.training.stages import TrainingContext, open_stage
from fastsd_helpers.errors import Interrupted, SettingsError, TrainingFailed
from fastsd_helpers.processes import Ranks, count_gpus
from fastsd_helpers.runtime import fault_point
from fastsd_helpers.sessions import Session

__all__ = ["Brief", "due_after", "follow", "load_learned", "rate_at", "weakest_device"]


@dataclass(frozen=True)
class Brief:
    """What the first process has found out, for the others."""

    start: Start
    config: PlannedConfig
    generation: Generation | None
    device: Device
    finished: bool  # there is nothing to do


def follow(ranks: Ranks, session: Session, stop: threading.Event) -> TrainResult:
    """Train along with the first process; returns what that one made.

    Raises:
        Interrupted: one of them was asked to stop; the first one has saved.
        TrainingFailed: another one has ended.
    """
    weakest_device(ranks)
    brief: Brief = ranks.share(_nothing)
    if not brief.finished:
        try:
            _train_along(ranks, brief, session, stop)
        except Interrupted:
            ranks.wait_for_the_end()
            raise
    try:
        return ranks.share(_nothing)
    except TrainingFailed as err:
        if stop.is_set():  # the first one has ended as it was asked to, while it generated images
            raise Interrupted("Stopped.", "The first process says where.") from err
        raise


def _nothing(*_said: str) -> Any:
    """What a process says and hands round that is not the first."""


def _train_along(ranks: Ranks, brief: Brief, session: Session, stop: threading.Event) -> None:
    start, config = brief.start, brief.config
    base = _base_here(start)
    context = TrainingContext(base, start.config, brief.device, ranks=ranks, parts=start.parts)
    if brief.generation is not None:
        load_learned(context, start, brief.generation)
    fault_point("segment.recorded")
    images = ClassImages(session, context, start.dataset.train)
    pictures = images.fill(say=_nothing, stopped=stop.is_set)
    context.fill_caches(start.dataset, pictures, stopped=stop.is_set)
    for leg, done in start.open_legs:
        generation = brief.generation if done else None
        trainer = open_stage(leg.stage, context, generation, key=leg.key, before=leg.before)
        ranks.wait()  # the first one evaluates
        for own in range(done, leg.steps):
            if ranks.any(stop.is_set()):
                raise Interrupted("Stopped.", "Train again with the same session to resume.")
            loss = trainer.take_step(leg.before + own, rate_at(config, leg, own))
            fault_point(f"step.{leg.stage}")
            if loss != loss or loss == float("inf"):
                ranks.wait_for_the_end()  # the first one says so
                raise Interrupted("Stopped.", "The first process says why.")
            if any(due_after(config, leg, own + 1)):
                fault_point("waiting")
                ranks.wait()
        context.keep(trainer)
        del trainer
    fault_point("finish.begin")


def _base_here(start: Start) -> BaseModel:
    """The run's model on this machine, which may be another one than the first process's."""
    if start.base.folder.is_dir():
        return start.base
    found = BaseModel.fetch(start.base.ref)
    if found.sha256() != start.base_model["sha256"]:
        raise SettingsError(
            f"The base model {start.base.ref} has other weights on this machine than on the first one.",
            "Put the same files there on all machines.",
        )
    return replace(start.base, folder=found.folder)


# --------------------------------------------------------------------------------------------- what all of them do


def weakest_device(ranks: Ranks, planned: int = 1) -> tuple[Device, str]:
    """What every process's device can do, so that one choice of settings suits all; with a sentence if they differ.

    Args:
        ranks: the processes.
        planned: how many there will be, each on a GPU of its own, where a run is only planned.
    """
    planned = min(planned, count_gpus())
    found = [describe_device(gpu) for gpu in range(planned)] if planned > 1 else ranks.gather(describe_device())
    least = min(found, key=lambda device: device.memory_bytes)
    most = max(found, key=lambda device: device.memory_bytes)
    names = list(dict.fromkeys(device.name for device in found))
    said = ""
    if len(names) > 1 or least.memory_bytes < 0.9 * most.memory_bytes:
        said = (
            f"The GPUs differ: settings are chosen for the smallest, {least.name} with {least.memory_gib:.0f} GiB; "
            "each step takes as long as the slowest of them."
        )
    has_bf16 = all(device.has_bf16 for device in found)
    return replace(least, name=" and ".join(names), has_bf16=has_bf16), said


def load_learned(context: TrainingContext, start: Start, generation: Generation) -> None:
    """Load what was trained before this call.

    What a leg that was cut has learned its optimizer's state belongs to: the leg loads both.
    """
    unfinished = {leg.stage for leg, done in start.open_legs if done}
    for stage in STAGE_NAMES:
        if stage in generation.roles and stage not in unfinished:
            context.trained[stage] = generation.load(stage)


def rate_at(config: PlannedConfig, leg: Leg, own: int) -> float:
    """The learning rate of a leg's step, counted from 0."""
    return getattr(config, f"{leg.stage}_lr") * lr_factor_in_legs(config.lr_scheduler, own, list(leg.parts))


def due_after(config: PlannedConfig, leg: Leg, finished: int) -> tuple[bool, bool]:
    """Whether samples, and whether a checkpoint, are due once that number of a leg's steps is finished."""
    to_sample = config.sample_every > 0 and finished % config.sample_every == 0
    return to_sample, finished == leg.steps or (config.save_every > 0 and finished % config.save_every == 0)
