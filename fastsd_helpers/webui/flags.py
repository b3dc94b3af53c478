"""Memory of the GPU and families of the models -> the flags a web UI is started with, each with its reason."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastsd_helpers.device import Device, describe_device, host_memory_bytes
from fastsd_helpers.downloads.table import read_table
from fastsd_helpers.errors import WebUIError
from fastsd_helpers.webui.catalog import WebUI, uis

__all__ = ["GPUS", "Machine", "Rule", "choose_flags", "describe_machine", "rules"]


@dataclass(frozen=True)
class Machine:
    """What decides the flags: the GPU's memory and kind, and the host's memory, in GiB."""

    name: str
    gpu_gib: float  # 0: no GPU
    host_gib: float
    capability: tuple[int, int] | None = None


# The machines people rent, as they report themselves; host memory is that of Colab's plans for them.
GPUS = {
    "T4": Machine("T4", 14.7, 12.7, (7, 5)),
    "L4": Machine("L4", 22.0, 53.0, (8, 9)),
    "A100": Machine("A100", 39.4, 83.5, (8, 0)),
    "H100": Machine("H100", 79.1, 200.0, (9, 0)),
    "G4": Machine("G4", 94.9, 170.0, (12, 0)),
}


@dataclass(frozen=True)
class Rule:
    """Flags for models of these families on GPUs with less than so much memory; the first rule that fits is taken."""

    ui: str
    families: tuple[str, ...]
    below_gib: float
    flags: tuple[str, ...]
    reason: str


_EVERY = ("sd15", "sd21", "sdxl", "flux")  # families, those that need least memory first


def rules() -> list[Rule]:
    """The whole table of flags.toml, which has the sources."""
    return [
        Rule(ui, tuple(row["families"]), row["below"], tuple(row["flags"]), row["reason"])
        for ui, rows in _table().items()
        for row in rows["rules"]
    ]


def _table() -> dict[str, Any]:
    return read_table("webui/flags.toml")


def describe_machine(device: Device | None = None) -> Machine:
    """This machine as the table sees it."""
    device = device or describe_device()
    gpu_gib = device.memory_gib if device.kind == "cuda" else 0.0
    return Machine(device.name, gpu_gib, host_memory_bytes() / 2**30, device.capability)


def choose_flags(
    ui: WebUI,
    family: str,
    machine: Machine,
    *,
    vram: str = "auto",
    precision: str = "auto",
    attention: str = "sdp",
    also: Mapping[str, str] | None = None,
) -> tuple[list[str], list[str]]:
    """Choose the flags for a web UI, a family of models and a machine.

    Args:
        vram: auto (the table), or full, medium, low.
        precision: auto, fp16, fp32.
        attention: sdp, sdp-repeatable (same image for the same seed), split.
        also: other families that it can be switched to while it runs, each with the name of a file: flags are for
            the one that needs most.

    Returns:
        The flags, and one sentence of reason for each choice that was made.

    Raises:
        WebUIError: the UI does not run this family; the hint says which one does.
    """
    if family not in ui.families:
        others = [other.title for other in uis() if family in other.families]
        raise WebUIError(
            f"{ui.title} does not run {family} models.",
            f"Choose {' or '.join(others)}." if others else f"It runs {', '.join(ui.families)}.",
        )
    base, more = _plain(family), []
    for other, name in (also or {}).items():
        if _EVERY.index(_plain(other)) > _EVERY.index(base):
            base = _plain(other)
            more = [f"{name}, a model of {base}, can be chosen too and needs the most memory."]
    flags, reasons = _memory_flags(ui, base, machine, vram)
    reasons = [*more, *reasons]
    precision_flags, precision_reasons = _precision_flags(ui, base, machine, precision)
    flags += precision_flags
    reasons += precision_reasons
    flags += _table()[ui.key]["attention"][attention]
    return flags, reasons


def _plain(family: str) -> str:
    return family.removesuffix("-inpaint").removesuffix("-refiner")


def _memory_flags(ui: WebUI, base: str, machine: Machine, vram: str) -> tuple[list[str], list[str]]:
    if machine.gpu_gib == 0:
        return [*_table()[ui.key]["cpu"]], [
            "There is no GPU: images are generated on the CPU, which takes minutes each."
        ]
    if vram != "auto":
        return [*_table()[ui.key]["vram"][vram]], [f"Memory: '{vram}' was asked for."]
    fitting = (rule for rule in rules() if rule.ui == ui.key and base in rule.families)
    rule = next(rule for rule in fitting if machine.gpu_gib < rule.below_gib)
    flags = list(rule.flags)
    reasons = [f"{machine.name} has {machine.gpu_gib:.1f} GiB, for {base}: {rule.reason}."]
    if ui.key == "a1111" and base == "sdxl" and machine.host_gib < 16 and machine.gpu_gib >= 11.5:
        flags.append("--lowram")
        reasons.append(f"The machine has {machine.host_gib:.1f} GiB of RAM: weights are read straight to the GPU.")
    return flags, reasons


def _precision_flags(ui: WebUI, base: str, machine: Machine, precision: str) -> tuple[list[str], list[str]]:
    if ui.key == "comfyui":
        named = {"fp32": ["--force-fp32"], "fp16": ["--force-fp16"]}.get(precision, [])
        return named, [f"Precision: '{precision}' was asked for."] if named else []
    if ui.key == "forge-neo":
        return [], []
    if machine.gpu_gib == 0:
        # Half precision is not there on a CPU; the error it gives speaks of an NVIDIA driver.
        return ["--no-half"], ["On a CPU the precision is 32 bit."]
    if precision == "fp32":
        return ["--no-half"], ["Precision: 32 bit was asked for; it takes twice the memory."]
    # The VAE of SDXL overflows in 16 bit (black images); it costs little to run this part alone in 32 bit.
    return ["--no-half-vae"], ["The VAE runs in 32 bit, so that no image turns black."]
