"""Outlook: how often a run would save and what it could lose, from the settings alone, before any model is loaded."""

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile
from fastsd_helpers.dreambooth.dataset.prepared import recorded_images
from fastsd_helpers.dreambooth.presets import choose_base_model
from fastsd_helpers.dreambooth.running.forecast import Plan, Standing, plan_run
from fastsd_helpers.dreambooth.settings import DreamBoothConfig, resolve_settings
from fastsd_helpers.dreambooth.training.segments import STAGE_NAMES
from fastsd_helpers.errors import DiskFull, FastSDError, ModelError, SettingsError
from fastsd_helpers.registry import ModelSpec, find_model, spec_of
from fastsd_helpers.runtime import describe_device
from fastsd_helpers.sessions import Session

__all__ = ["PUBLISHED", "Counts", "count_values", "counts_of", "plan_from_settings", "saving_outlook", "standing_of"]

# LoRA matrices lie beside these layers of the attention.
_TARGETS = {
    "unet": (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight"),
    "text_encoder": (".q_proj.weight", ".k_proj.weight", ".v_proj.weight", ".out_proj.weight"),
}


@dataclass(frozen=True)
class Counts:
    """How many values a model's parts have, and a LoRA of rank 1 on their attention layers."""

    unet: int
    text_encoder: int
    vae: int
    lora_unet: int
    lora_text_encoder: int

    def trained(self, config: DreamBoothConfig) -> dict[str, int]:
        """Stage -> number of values that are trained."""
        if config.method == "lora":
            return self.lora(config.lora_rank)
        return {"text_encoder": self.text_encoder, "unet": self.unet}

    def lora(self, rank: int) -> dict[str, int]:
        """Stage -> number of values of a LoRA of this rank."""
        return {"text_encoder": rank * self.lora_text_encoder, "unet": rank * self.lora_unet}

    def export_bytes(self, config: DreamBoothConfig) -> int:
        """Size of the finished float16 file."""
        values = self.lora(config.lora_rank).values() if config.method == "lora" else (
            self.unet, self.text_encoder, self.vae
        )  # fmt: skip
        return 2 * sum(values) + 2**20


# The published models. Source: their configurations and single files; a test builds the one and counts the other.
PUBLISHED = {
    "sd15": Counts(859_520_964, 123_060_480, 83_653_863, 199_296, 73_728),
    "sd21": Counts(865_910_724, 340_387_840, 83_653_863, 207_488, 188_416),
}


def counts_of(spec: ModelSpec, folder: Path | None = None) -> Counts | None:
    """Count a model's values: from its files' headers where they are on this machine, else as published.

    Args:
        folder: a Diffusers folder that the user named.
    """
    if folder is None and spec.folder is not None:
        folder = Path(str(importlib.resources.files("fastsd_helpers"))).joinpath(*spec.folder.split("/"))
    return count_values(folder) if folder is not None else PUBLISHED.get(spec.family)


def count_values(folder: Path) -> Counts | None:
    """Count the values in a Diffusers folder's .safetensors files by their headers; None without such files."""
    found: dict[str, int] = {}
    for part in ("unet", "text_encoder", "vae"):
        files = [path for path in sorted((folder / part).glob("*.safetensors")) if ".fp16." not in path.name]
        if not files:
            return None
        for path in files:
            with SafetensorsFile(path) as file:
                for name, fact in file.tensors.items():
                    found[part] = found.get(part, 0) + fact.count
                    if name.endswith(_TARGETS.get(part, ())):
                        found[f"lora_{part}"] = found.get(f"lora_{part}", 0) + sum(fact.shape)
    return Counts(**{name: found.get(name, 0) for name in Counts.__dataclass_fields__})


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
        ModelError, SettingsError: the settings cannot be used.
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
        counts = counts_of(spec, folder)
    else:
        try:
            spec = find_model(ref)
        except ModelError:  # a repository of the Hub, or a file: its size is not known before it is here
            return None
        counts = counts_of(spec)
    if counts is None or not spec.trainable:
        return None
    photos = sum(not item["held_out"] for item in recorded_images(session)) if record.get("dataset") else 0
    try:
        resolved, _reasons = resolve_settings(config, spec, device, saved=saved, photos=photos)
    except SettingsError:  # another run than the one that is recorded
        saved = None
        resolved, _reasons = resolve_settings(config, spec, device, photos=photos)
    stages = {stage: steps for stage in STAGE_NAMES if (steps := getattr(resolved, f"{stage}_steps"))}
    standing = standing_of(session, stages, counts.lora(resolved.lora_rank))
    if saved is None:
        standing = Standing(gives_back=standing.gives_back, lora=standing.lora)
    return plan_run(
        resolved, stages, counts.trained(resolved), counts.export_bytes(resolved), session.folder, standing=standing
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
