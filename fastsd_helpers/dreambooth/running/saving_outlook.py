"""Outlook: how often a run would save and what it could lose, from the settings alone, before any model is loaded."""

import importlib.resources
from collections import Counter
from pathlib import Path
from typing import Any

from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile
from fastsd_helpers.device import describe_device
from fastsd_helpers.dreambooth.dataset.prepared import recorded_images
from fastsd_helpers.dreambooth.families import Counts, Family, family_named
from fastsd_helpers.dreambooth.presets import choose_base_model
from fastsd_helpers.dreambooth.running.forecast import Plan, Standing, plan_run
from fastsd_helpers.dreambooth.settings import DreamBoothConfig, resolve_settings
from fastsd_helpers.dreambooth.training.segments import STAGE_NAMES
from fastsd_helpers.errors import DiskFull, FastSDError, ModelError, SettingsError
from fastsd_helpers.registry import TRAINABLE_FAMILIES, ModelSpec, find_model, spec_of
from fastsd_helpers.sessions import Session

__all__ = [
    "count_values",
    "counts_of",
    "plan_from_settings",
    "saving_outlook",
    "standing_of",
]


def counts_of(spec: ModelSpec, folder: Path | None = None, *, targets: str | None = None) -> Counts | None:
    """Count a model's values: from its files' headers where they are on this machine, else as published.

    Args:
        spec: the model.
        folder: a Diffusers folder that the user named.
        targets: the layers that a LoRA would be added to; None for those of the attention.
    """
    if spec.family not in TRAINABLE_FAMILIES:
        return None
    targets = targets or "attention"
    if folder is None and spec.folder is not None:
        folder = Path(str(importlib.resources.files("fastsd_helpers"))).joinpath(*spec.folder.split("/"))
    family = family_named(spec.family)
    return count_values(family, folder, targets=targets) if folder is not None else family.published[targets]


def count_values(family: Family, folder: Path, *, targets: str) -> Counts | None:
    """Count the values in a Diffusers folder's .safetensors files by their headers; None without such files."""
    found = Counter[str]()
    names = {part: stage for stage in STAGE_NAMES for part in family.parts_of(stage)}
    for part in family.parts:
        files = [path for path in sorted((folder / part).glob("*.safetensors")) if ".fp16." not in path.name]
        if not files:
            return None
        stage = names.get(part, part)
        for path in files:
            with SafetensorsFile(path) as file:
                for name, fact in file.tensors.items():
                    found[stage] += fact.count
                    layer, dot, _ = name.rpartition(".weight")
                    if dot and part in family.lora_layers and family.takes_lora(part, layer, targets):
                        found[f"lora_{stage}"] += sum(fact.shape[:2])
    return Counts(**{name: found[name] for name in Counts.__dataclass_fields__})


def standing_of(session: Session, stages: dict[str, int], lora: dict[str, int]) -> Standing:
    """What the session's record knows about its run and its Drive.

    Args:
        stages: stage -> optimizer steps, in order.
        lora: stage -> number of values of a LoRA.
    """
    record = session.record
    rows = [row for row in record.get("checkpoints") or [] if isinstance(row, dict) and not row.get("keep")]
    return Standing(
        done=_steps_done(record.get("progress") or {}, stages),
        held_bytes=sum(row.get("bytes", 0) for row in rows),
        gives_back=record.get("drive_gives_back"),
        seconds_per_step=record.get("seconds_per_step") or {},
        lora=lora,
    )


def _steps_done(progress: dict[str, Any], stages: dict[str, int]) -> dict[str, int]:
    done, names = {}, list(stages)
    if progress.get("stage") in names:
        reached = names.index(progress["stage"])
        done = {name: stages[name] for name in names[:reached]}
        done[names[reached]] = progress.get("step", 0)
    return done


def plan_from_settings(config: DreamBoothConfig, session: Session) -> Plan | None:
    """Plan a run from settings, registry and the session's record; None for a model whose size is not known here.

    Raises:
        ModelError: the settings cannot be used.
        SettingsError: the settings cannot be used.
        DiskFull: not even the finished file fits.
    """
    record = session.record
    device = describe_device()
    saved = record.get("settings") if record.get("run") else None
    ref = config.base_model if config.base_model != "auto" else (saved or {}).get("base_model", "auto")
    ref, _reason = choose_base_model(ref, device, demo_pictures=bool((record.get("dataset") or {}).get("demo")))
    folder = Path(ref).expanduser()
    if (folder / "model_index.json").is_file():
        spec = spec_of(ref, folder)
        found: Path | None = folder
    else:
        try:
            spec = find_model(ref)
        except ModelError:  # a repository of the Hub, or a file: its size is not known before it is here
            return None
        found = None
    if not spec.trainable:
        return None
    photos = sum(not item["held_out"] for item in recorded_images(session)) if record.get("dataset") else 0
    try:
        resolved, _reasons = resolve_settings(config, spec, device, saved=saved, photos=photos)
    except SettingsError:  # another run than the one that is recorded
        saved = None
        resolved, _reasons = resolve_settings(config, spec, device, photos=photos)
    counts = counts_of(spec, found, targets=resolved.lora_targets)
    if counts is None:
        return None
    stages = {stage: steps for stage in STAGE_NAMES if (steps := getattr(resolved, f"{stage}_steps"))}
    standing = standing_of(session, stages, counts.lora(resolved.lora_rank))
    if saved is None:
        standing = Standing(gives_back=standing.gives_back, lora=standing.lora)
    kind = resolved.method, resolved.lora_rank
    return plan_run(
        resolved, stages, counts.trained(*kind), counts.export_bytes(*kind, stages), session.folder, standing=standing
    )


def saving_outlook(config: DreamBoothConfig, session: Session) -> list[str]:
    """Say how often a run with these settings would save, what is lost at worst, and what a LoRA would cost.

    No model is loaded or fetched. Nothing is said where nothing is known: for a model that is not here yet, or settings
    that another message is about.
    """
    try:
        plan = plan_from_settings(config, session)
    except DiskFull as err:
        return [f"{err.problem} {err.hint}"]
    except FastSDError:
        return []
    return [] if plan is None or not plan.lost_steps else [*plan.reasons, *plan.saving_lines()]
