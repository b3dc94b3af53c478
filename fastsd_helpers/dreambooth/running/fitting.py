"""Whether a training fits into the memory that is there: what is chosen for that, and what is refused.

Nothing is loaded: a run that does not fit is refused with the settings that would.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

from fastsd_helpers.device import Device
from fastsd_helpers.dreambooth.running.memory import Memory
from fastsd_helpers.dreambooth.settings import ResolvedConfig
from fastsd_helpers.dreambooth.training.base_model import BaseModel
from fastsd_helpers.errors import SettingsError

__all__ = ["fit_into_memory", "savings", "savings_in_words"]

_SPARE = 0.9  # of the memory is planned with: an allocator loses some, and other programs take some
_OFF_BY = 1.2  # the formula is good to a fifth: what is above that is refused, what is below it only said
_USUAL_PX = 512  # above it, the square of the side is what fills the memory


def fit_into_memory(
    base: BaseModel, config: ResolvedConfig, *, device: Device, given: Collection[str], begun: bool = False
) -> tuple[ResolvedConfig, list[str]]:
    """Choose gradient checkpointing and the batch size by the memory they take; returns the settings and the reasons.

    Args:
        base: the model; its shapes alone are looked at.
        config: the settings with everything else decided.
        device: that each process has; of several the smallest.
        given: settings that the user chose.
        begun: the run has begun with these settings, which may not change.

    Raises:
        SettingsError: it does not fit, with what would.
    """
    memory, room = Memory(base, device.kind), device.memory_bytes
    there = f"{_gb(room)} ({device.name})"
    reasons = []
    if not room or memory.surely_fits(config, room):
        if config.gradient_checkpointing is None:
            reasons.append(f"gradient checkpointing off: this training takes a fraction of the {there}" if room else "")
            config = replace(config, gradient_checkpointing=False)
        return config, reasons
    if config.gradient_checkpointing is None:
        peak = memory.peak_bytes(config)
        on = peak > _SPARE * room
        config = replace(config, gradient_checkpointing=on)
        reasons.append(
            f"gradient checkpointing on: without it this training takes about {_gb(peak)}, and there are {there}"
            if on
            else f"gradient checkpointing off: this training takes about {_gb(peak)} without it, and there are {there}"
        )
    peak = memory.peak_bytes(config)
    if peak > _SPARE * room and not begun and not {"batch_size", "accumulation"} & set(given):
        config, peak, reason = _share_batch(memory, config, peak, room)
        reasons.append(reason)
    if peak > _OFF_BY * room:
        raise SettingsError(
            f"This training takes about {_gb(peak)} of memory, and there are {there}.",
            _what_fits(memory, base, config, room, given=given, begun=begun),
        )
    if peak > _SPARE * room:
        reasons.append(f"this training takes about {_gb(peak)}, and there are {there}: it may run out of memory")
    return config, [reason for reason in reasons if reason]


def _share_batch(memory: Memory, config: ResolvedConfig, peak: int, room: int) -> tuple[ResolvedConfig, int, str]:
    """Divide the model's own batch into forward passes that fit; the images of a step stay as many."""
    for size in range(config.batch_size - 1, 0, -1):
        if config.batch_size % size == 0:
            passes = config.accumulation * config.batch_size // size
            smaller = replace(config, batch_size=size, accumulation=passes)
            needed = memory.peak_bytes(smaller)
            if needed <= _SPARE * room:
                why = f"at once the {config.batch_size} images of a step take about {_gb(peak)}"
                return smaller, needed, f"batch size {size}, {passes} forward passes per step: {why}"
    return config, peak, ""


def savings(settings: Mapping[str, Any], place: Literal["gpu", "host"], least_px: int = _USUAL_PX) -> dict[str, Any]:
    """The settings that would save memory, the one that costs least first, with their values.

    Args:
        settings: a run's.
        place: whose memory it is; what a GPU computes takes little of this machine's own.
        least_px: the smallest resolution that is advised.
    """
    on_gpu, px = place == "gpu", max(least_px, _USUAL_PX)
    found: dict[str, Any] = {}
    if (settings.get("batch_size") or 1) > 1:
        found["batch_size"] = 1
    if on_gpu and settings.get("gradient_checkpointing") is not True:
        found["gradient_checkpointing"] = True
    if on_gpu and settings.get("precision") == "fp32":
        found["precision"] = "bf16" if settings.get("optimizer") == "adafactor" else "fp16"
    if on_gpu and settings.get("optimizer") == "adamw":
        found["optimizer"] = "adamw8bit"
    if settings.get("resolutions"):
        found["resolutions"] = None
    elif (settings.get("resolution") or 0) > px:
        found["resolution"] = px
    if settings.get("ema"):
        found["ema"] = 0.0
    if settings.get("method", "full") == "full":
        found["method"] = "lora"
    return found


def savings_in_words(changes: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Such changes, each as `name value (now value)`."""
    said = []
    for name, value in changes.items():
        shown = {"resolutions": "without the largest", "gradient_checkpointing": "on", "ema": "0"}.get(name, value)
        now = "" if name in ("gradient_checkpointing", "ema") else f" (now {settings.get(name, 'full')})"
        said.append(f"{name} {shown}{now}")
    return said


def _what_fits(
    memory: Memory, base: BaseModel, config: ResolvedConfig, room: int, *, given: Collection[str], begun: bool
) -> str:
    """The fewest changes that make it fit, in words."""
    changes: dict[str, Any] = {}
    able = savings(vars(config), "gpu", base.spec.min_px)
    if memory.device != "cuda":
        able = {name: value for name, value in able.items() if name not in ("precision", "optimizer")}
    for name, value in able.items():
        changes[name] = value
        if memory.peak_bytes(replace(config, **changes)) <= _SPARE * room:
            break
    else:
        return "No setting makes it fit: choose a smaller model, or a machine with more memory."
    for name in list(changes)[-2::-1]:  # those that were tried before it and are not needed
        fewer = {key: value for key, value in changes.items() if key != name}
        if memory.peak_bytes(replace(config, **fewer)) <= _SPARE * room:
            changes = fewer
    if "method" in changes and config.optimizer == "adafactor" and "optimizer" in given:
        changes["optimizer"] = "adamw"  # the other one is for all weights alone
    needed = _gb(memory.peak_bytes(replace(config, **changes)))
    said = f"{', '.join(savings_in_words(changes, vars(config)))}: that takes about {needed}"
    if begun:
        return f"Resume it where there is more memory, or start again from step 0 with --restart and {said}."
    return f"Change {said}."


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
