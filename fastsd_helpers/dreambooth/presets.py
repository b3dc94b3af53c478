"""Starting values for a kind of subject, steps from the number of photos, and the learning rates of LoRA."""

from dataclasses import dataclass, field
from typing import Any

from fastsd_helpers.registry import ModelSpec

__all__ = ["PRESETS", "Preset", "choose_lora_rates", "choose_steps"]

# The number of photos that a model's own steps are meant for: SD 1.5's 1500 steps are 100 a photo then, the number
# that public DreamBooth guides agree on.
_PHOTOS = 15
# Too few steps teach nothing, whatever the number of photos; too many only repeat them.
_FEWEST, _MOST = 1 / 3, 3.0


@dataclass(frozen=True)
class Preset:
    """What suits a kind of subject: settings, and how its steps differ from the model's."""

    settings: dict[str, Any] = field(default_factory=dict)
    unet_factor: float = 1.0
    text_encoder_factor: float = 1.0


# Starting points, not measurements. Offset noise for styles is the advice of the notebook this project replaces;
# min-SNR with gamma 5 is its paper's (Hang et al. 2023) recommendation. A style is in the picture and hardly in the
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
    return max(10, round(steps / 10) * 10)


def choose_lora_rates(spec: ModelSpec) -> tuple[dict[str, float], str]:
    """Choose LoRA's learning rates: ten times the model's own, at least 1e-4 (U-Net) and 5e-5 (text encoder).

    The matrices start at zero and need larger steps than weights that are nearly right already; 1e-4 is what
    diffusers' LoRA examples use.
    """
    rates = {
        name: max(least, 10 * spec.defaults.get(name, 0.0))
        for name, least in (("unet_lr", 1e-4), ("text_encoder_lr", 5e-5))
    }
    return rates, "rates for LoRA"
