"""What is chosen for a user: by the kind of subject, the number of photos, the method, and the device."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

from fastsd_helpers.device import Device
from fastsd_helpers.errors import ModelError, SettingsError
from fastsd_helpers.registry import ModelSpec

__all__ = [
    "BASE_ON_A_GPU",
    "PRESETS",
    "Preset",
    "choose_base_model",
    "choose_optimizer",
    "choose_precision",
    "choose_prior",
    "choose_rates",
    "choose_steps",
    "rows_per_step",
]

BASE_ON_A_GPU = "sd15"  # what "auto" stands for there
# The number of photos that a model's own steps are meant for: SD 1.5's 1500 steps are 100 a photo then, the number
# that public DreamBooth guides agree on.
_PHOTOS = 15
# Too few steps teach nothing, whatever the number of photos; too many only repeat them.
_FEWEST, _MOST = 1 / 3, 3.0
_CLASS_IMAGES = 100


@dataclass(frozen=True)
class Preset:
    """What suits a kind of subject: settings, and how its steps differ from the model's."""

    settings: dict[str, Any] = field(default_factory=dict)
    unet_factor: float = 1.0
    text_encoder_factor: float = 1.0


# Starting points, not measurements. Offset noise for styles is the advice of the notebook this project replaces;
# min-SNR with gamma 5 is its paper's (Hang et al. 2023) recommendation. A style is in the image and hardly in the
# words, so its text encoder is trained less; a thing is learnt in fewer steps than a face.
PRESETS = {
    "none": Preset(),
    "face": Preset({"min_snr": 5.0}),
    "object": Preset({"min_snr": 5.0}, unet_factor=0.8, text_encoder_factor=0.8),
    "style": Preset({"offset_noise": 0.1}, unet_factor=1.0, text_encoder_factor=0.5),
}


def choose_steps(spec: ModelSpec, photos: int, *, preset: str, rows: float) -> tuple[dict[str, int], str]:
    """Choose both stages' steps from the number of photos: ({"unet_steps": n, "text_encoder_steps": m}, reason).

    Args:
        spec: the model, whose default steps are taken as meant for 15 photos.
        photos: images that are trained on.
        preset: key of PRESETS.
        rows: how many times the model's own batch one optimizer step sees; more need fewer steps.
    """
    wanted = photos / _PHOTOS
    share = min(max(wanted, _FEWEST), _MOST)
    chosen = PRESETS[preset]
    unet = _rounded(spec.defaults["unet_steps"] * share * chosen.unet_factor / rows)
    # The text encoder forgets other words when it is trained long: never more than the model's own steps.
    text = _rounded(spec.defaults["text_encoder_steps"] * min(share, 1.0) * chosen.text_encoder_factor / rows)
    limit = "" if share == wanted else ", the fewest" if share > wanted else ", the most"
    kind = "" if preset == "none" else f" and the preset {preset}"
    return (
        {"unet_steps": unet, "text_encoder_steps": text},
        f"steps from {photos} photo{'s' if photos != 1 else ''}{limit}{kind}",
    )


def _rounded(steps: float) -> int:
    return max(10, round(steps / 10) * 10) if steps else 0


def choose_rates(spec: ModelSpec, method: str) -> tuple[dict[str, float], str]:
    """Choose the learning rates of a method that the model's own are not for.

    A LoRA's are ten times those of all weights, at least 1e-4 (U-Net) and 5e-5 (text encoder): its matrices start at
    zero and need larger steps than weights that are nearly right already; 1e-4 is what diffusers' LoRA examples use.
    The other way round it is a tenth: 1e-5 for SDXL, as OneTrainer's preset has it.
    """
    if spec.defaults.get("method", "full") == method:
        return {}, ""
    if method == "full":
        rates = {name: round(spec.defaults[name] / 10, 10) for name in ("unet_lr", "text_encoder_lr")}
        return rates, "rates for all weights"
    rates = {
        name: max(least, 10 * spec.defaults.get(name, 0.0))
        for name, least in (("unet_lr", 1e-4), ("text_encoder_lr", 5e-5))
    }
    return rates, "rates for LoRA"


def choose_base_model(ref: str, device: Device, *, demo_pictures: bool) -> tuple[str, str]:
    """Choose the model behind "auto": (reference, reason); anything else is returned as it is.

    Raises:
        ModelError: the user's own images and no GPU.
    """
    if ref != "auto":
        return ref, ""
    if demo_pictures:
        return "demo", "base model demo: the images are the demo's own"
    if device.kind == "cuda":
        return BASE_ON_A_GPU, f"base model {BASE_ON_A_GPU}: there is a GPU ({device.name})"
    raise ModelError(
        "There is no GPU, and Stable Diffusion 1.5 takes days to train without one.",
        "In Colab: Runtime > Change runtime type > T4 GPU. To try the small embedded model instead, choose base_model "
        "demo (--base-model demo).",
    )


def choose_precision(wanted: str, device: Device) -> tuple[str, str]:
    """Choose the compute dtype behind "auto": (dtype, reason)."""
    if wanted != "auto":
        if wanted == "bf16" and device.kind == "cuda" and not device.has_bf16:
            return wanted, f"precision bf16 as you chose; {device.name} only emulates it, fp16 is faster there"
        if wanted == "fp16" and device.kind == "cpu":
            better = "bf16 or fp32" if device.has_bf16 else "fp32"
            return wanted, f"precision fp16 as you chose; a CPU is many times slower at it than at {better}"
        return wanted, ""
    if device.kind == "cuda":
        if device.has_bf16:
            return "bf16", f"precision bf16: {device.name} has it, and it needs no loss scaling"
        return "fp16", f"precision fp16: {device.name} has no bf16 units; the loss scale is saved with each checkpoint"
    if device.has_bf16:
        return "bf16", "precision bf16: this CPU has bf16 units"
    return "fp32", "precision fp32: this CPU has no half-precision units"


def choose_optimizer(config: Any, device: Device, *, large: bool = False) -> tuple[str, str]:
    """Choose the optimizer behind "auto".

    Args:
        config: a run's settings, its precision chosen.
        device: where it is trained.
        large: whether AdamW's state for all weights is too much for most GPUs.

    Returns:
        the optimizer, and the reason.

    Raises:
        SettingsError: it cannot be had, or not with the other settings.
    """
    wanted = config.optimizer
    installed = importlib.util.find_spec("bitsandbytes") is not None
    if wanted == "adafactor" or (wanted == "auto" and large and config.method == "full"):
        return "adafactor", _check_adafactor(config)
    if wanted == "adamw8bit" and (device.kind != "cuda" or not installed):
        missing = "there is no NVIDIA GPU" if device.kind != "cuda" else "bitsandbytes is not installed"
        raise SettingsError(
            f"optimizer (--optimizer) is adamw8bit, but {missing}.", "Choose adamw, or auto, which chooses what works."
        )
    if wanted != "auto":
        return wanted, ""
    if device.kind == "cuda" and installed:
        return "adamw8bit", "optimizer adamw8bit: a quarter of the memory and checkpoint size of AdamW's state"
    why = "bitsandbytes is not installed" if device.kind == "cuda" else "8-bit AdamW needs an NVIDIA GPU"
    return "adamw", f"optimizer adamw: {why}"


def _check_adafactor(config: Any) -> str:
    """Say how it takes its steps; raises SettingsError for what it cannot be combined with."""
    lora = "or train a LoRA (--method lora), which takes less memory still and any of them"
    if config.method == "lora":
        raise SettingsError(
            "optimizer (--optimizer) is adafactor, which saves memory where all weights are trained, and method is "
            "lora.",
            "Choose another optimizer, or auto.",
        )
    if config.precision == "fp16":
        raise SettingsError(
            "optimizer (--optimizer) adafactor keeps weights in bf16 or fp32, and precision (--precision) is fp16.",
            f"Choose precision bf16 or fp32, {lora}.",
        )
    if config.precision == "bf16" and config.ema:
        raise SettingsError(
            "ema (--ema) averages in the precision of the weights, which optimizer adafactor keeps in bf16: its small "
            "steps would be lost.",
            "Leave out ema, or choose precision fp32.",
        )
    kept = "weights are kept in bf16 and rounded stochastically" if config.precision == "bf16" else "weights in fp32"
    if config.accumulation * (config.processes or 1) == 1:
        return f"optimizer adafactor: {kept}, each tensor is stepped within the backward pass"
    return (
        f"optimizer adafactor: {kept}; with several forward passes in a step their gradients are summed before it, "
        f"which takes {2 if config.precision == 'bf16' else 4} bytes a weight more than one alone"
    )


def rows_per_step(config: Any, spec: ModelSpec) -> float:
    """How many times the model's own number of images one optimizer step sees; `config` are a run's settings."""
    own = spec.defaults.get("batch_size", 1)
    return (config.batch_size or own) * config.accumulation * (config.processes or 1) / own


def choose_prior(config: Any) -> dict[str, Any]:
    """Choose what a run with a class prompt has beside; nothing where its settings switch that off."""
    if config.class_prompt is None or config.prior_weight == 0 or config.class_images == 0:
        return {}
    return {"prior_weight": 1.0, "class_images": _CLASS_IMAGES}
