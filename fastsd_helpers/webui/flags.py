"""Memory of the GPU and families of the models -> the flags a web UI is started with, each with its reason."""

from collections.abc import Mapping
from dataclasses import dataclass

from fastsd_helpers.errors import WebUIError
from fastsd_helpers.runtime import Device, describe_device, host_memory_bytes
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


_SMALL = ("sd15", "sd21")
_LARGE = ("sdxl",)
_EVERY = (*_SMALL, *_LARGE, "flux")
_ANY_MEMORY = float("inf")

# Sources: modules/cmd_args.py of v1.10.1 and its wiki page "Optimizations"; comfy/cli_args.py; backend/args.py of Forge
# Neo. The sizes of the weights in 16 bit: SD 1.5 2 GB, SD 2.1 2.5 GB, SDXL 7 GB, Flux 24 GB (12 GB in 8 bit) and its
# T5 10 GB more.
_RULES = (
    Rule("a1111", _SMALL, 3.5, ("--lowvram",), "the weights alone fill such a GPU: parts of the U-Net are offloaded"),
    Rule("a1111", _SMALL, 5.5, ("--medvram",), "text encoder, U-Net and VAE are on the GPU in turn"),
    Rule("a1111", _SMALL, _ANY_MEMORY, (), "everything stays on the GPU"),
    Rule("a1111", _LARGE, 5.5, ("--lowvram",), "7 GB of weights do not fit: parts of the U-Net are offloaded"),
    Rule("a1111", _LARGE, 11.5, ("--medvram-sdxl",), "text encoders, U-Net and VAE are on the GPU in turn"),
    Rule("a1111", _LARGE, _ANY_MEMORY, (), "everything stays on the GPU"),
    Rule("forge-neo", _EVERY, _ANY_MEMORY, (), "Forge Neo manages the memory itself"),
    Rule("comfyui", _SMALL, _ANY_MEMORY, (), "ComfyUI manages the memory itself"),
    Rule("comfyui", _LARGE, 5.5, ("--lowvram",), "parts of the model are offloaded"),
    Rule("comfyui", _LARGE, _ANY_MEMORY, (), "ComfyUI manages the memory itself"),
    Rule(
        "comfyui", ("flux",), 9.5, ("--lowvram",), "even in 4 bit it leaves little VRAM free: parts of it are offloaded"
    ),
    Rule("comfyui", ("flux",), _ANY_MEMORY, (), "ComfyUI manages the memory itself"),
)

_ATTENTION: dict[str, dict[str, tuple[str, ...]]] = {
    "a1111": {
        "sdp": ("--opt-sdp-attention",),
        "sdp-repeatable": ("--opt-sdp-no-mem-attention",),
        "split": ("--opt-split-attention",),
    },
    "forge-neo": {"sdp": (), "sdp-repeatable": (), "split": ()},
    "comfyui": {
        "sdp": ("--use-pytorch-cross-attention",),
        "sdp-repeatable": (),
        "split": ("--use-split-cross-attention",),
    },
}


def rules() -> list[Rule]:
    """The whole table."""
    return list(_RULES)


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
            base, more = (
                _plain(other),
                [f"{name}, a model of {_plain(other)}, can be chosen too and needs the most memory."],
            )
    flags, reasons = _memory_flags(ui, base, machine, vram)
    reasons = [*more, *reasons]
    precision_flags, precision_reasons = _precision_flags(ui, base, machine, precision)
    flags += precision_flags
    reasons += precision_reasons
    flags += _ATTENTION[ui.key][attention]
    return flags, reasons


def _plain(family: str) -> str:
    return family.removesuffix("-inpaint").removesuffix("-refiner")


def _memory_flags(ui: WebUI, base: str, machine: Machine, vram: str) -> tuple[list[str], list[str]]:
    if machine.gpu_gib == 0:
        cpu = {"comfyui": ["--cpu"], "forge-neo": ["--cpu", "--skip-torch-cuda-test"]}
        flags = cpu.get(ui.key, ["--use-cpu", "all", "--skip-torch-cuda-test"])
        return flags, ["There is no GPU: images are generated on the CPU, which takes minutes each."]
    if vram != "auto":
        chosen = {
            "a1111": {"full": [], "medium": ["--medvram"], "low": ["--lowvram"]},
            "forge-neo": {"full": ["--highvram"], "medium": ["--normalvram"], "low": ["--lowvram"]},
            "comfyui": {"full": ["--highvram"], "medium": ["--normalvram"], "low": ["--lowvram"]},
        }[ui.key][vram]
        return chosen, [f"Memory: '{vram}' was asked for."]
    rule = next(
        rule for rule in _RULES if rule.ui == ui.key and base in rule.families and machine.gpu_gib < rule.below_gib
    )
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
