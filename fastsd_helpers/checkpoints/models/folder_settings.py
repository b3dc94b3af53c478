"""What a Diffusers folder's configurations say and a single file has no place for: found by rule, kept in its header.

The rule: whatever differs from the configuration that the file would be given again. A web UI does not read the header,
so that each is named as well; a folder made of the file gets them back.

Source: the signatures of UNet2DConditionModel, AutoencoderKL, FluxTransformer2DModel and the schedulers in diffusers.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsd_helpers.checkpoints.formats.prediction import Prediction, marks, read_config
from fastsd_helpers.checkpoints.models.configs import VAE_FACTORS, component_config, scheduler_config
from fastsd_helpers.checkpoints.names.families import architecture_of
from fastsd_helpers.checkpoints.names.layout import PART_WORDS, Family

__all__ = [
    "SETTINGS",
    "VAE_ARCHITECTURES",
    "describe_folder",
    "resolution_of",
    "scaling_unknown",
    "settings_in_words",
    "settings_of_file",
    "settings_of_folder",
    "vae_family",
]

SETTINGS = "fastsd.settings"  # the header's field
_PARTS = ("unet", "transformer", "vae")
# Numbers that every UI has too, and ways of sampling that a user chooses there; None and False say nothing either.
_COMMON: dict[str, dict[str, tuple[Any, ...]]] = {
    "unet": {
        **{"dropout": (0.0,), "resnet_time_scale_shift": ("default",), "time_embedding_type": ("positional",)},
        **{"conv_in_kernel": (3,), "conv_out_kernel": (3,), "resnet_out_scale_factor": (1.0,)},
        **{"attention_type": ("default",), "addition_embed_type_num_heads": (64,)},
        **{"mid_block_type": ("UNetMidBlock2DCrossAttn",), "transformer_layers_per_block": (1,)},
        **{"addition_time_embed_dim": (256,)},
    },
    "transformer": {"patch_size": (1,), "out_channels": (64,)},
    "vae": {
        **{"force_upcast": (True,), "use_quant_conv": (True,), "use_post_quant_conv": (True,)},
        **{"mid_block_add_attention": (True,), "latents_mean": (), "shift_factor": (0, 0.0)},
    },
    "scheduler": {
        **{"algorithm_type": ("dpmsolver++",), "clip_sample_range": (1.0,), "dynamic_thresholding_ratio": (0.995,)},
        **{"final_sigmas_type": ("zero",), "flow_shift": (1.0,), "interpolation_type": ("linear",)},
        **{"lambda_min_clipped": (float("-inf"), "-inf"), "lower_order_final": (True,), "predict_x0": (True,)},
        **{"sample_max_value": (1.0,), "skip_prk_steps": (True,), "solver_order": (2,), "disable_corrector": ([],)},
        **{"solver_type": ("midpoint", "bh2"), "timestep_type": ("discrete",), "time_shift_type": ("exponential",)},
        **{"variance_type": ("fixed_small",), "timestep_spacing": ("leading", "linspace"), "steps_offset": (0, 1)},
        **{"set_alpha_to_one": (True, False), "clip_sample": (True, False), "sigma_schedule": ("karras",)},
        **{"use_karras_sigmas": (True,), "solver_p": (), "shift": (1.0,), "prediction_type": ()},
    },
}
_SAMPLERS = re.compile(
    r"(DDIM|DDPM|DEISMultistep|DPMSolverMultistep|DPMSolverSDE|DPMSolverSinglestep|EulerAncestralDiscrete|EulerDiscrete|"
    r"HeunDiscrete|KDPM2AncestralDiscrete|KDPM2Discrete|LMSDiscrete|PNDM|SASolver|UniPCMultistep)Scheduler"
)
# What weights show, so that a header must not say otherwise.
_SHOWN = (
    r"(in|out|latent)_channels|block_out_channels|cross_attention_dim|.*_block_types|layers_per_block|num_(single_)?layers|"
    r"projection_class_embeddings_input_dim|joint_attention_dim|pooled_projection_dim|guidance_embeds|"
    r"use_linear_projection|use_(post_)?quant_conv|addition_embed_type|transformer_layers_per_block"
)


def settings_of_folder(
    folder: Path, family: Family, widths: Mapping[str, int], prediction: Prediction, *, vae_of: str = ""
) -> dict[str, dict[str, Any]]:
    """Part -> name -> value of every setting that a single file of this folder could not tell.

    Args:
        folder: a whole pipeline, or one part with its config.json beside the weights.
        vae_of: of a VAE alone, the family that its file will name.
    """
    found: dict[str, dict[str, Any]] = {}
    if prediction.edm is not None and not marks(family, prediction):  # no UI reads it of such a file
        prediction = Prediction("epsilon", "")
    for part in _PARTS:
        if part in family.parts:
            config = _config_of(folder, part)
            wanted = component_config(family, part, widths, prediction=prediction, vae_of=vae_of)
            found[part] = _differing(part, config, wanted)
    schedule = read_config(folder / "scheduler" / "scheduler_config.json")
    if schedule and family.parts[0] != "vae":
        wanted = scheduler_config(family, prediction, guided=bool(widths.get("guided", 1)))
        found["scheduler"] = _differing("scheduler", schedule, wanted)
        found["scheduler"] |= _prediction_lost(family, prediction)
    return {part: settings for part, settings in found.items() if settings}


def _config_of(folder: Path, part: str) -> dict[str, Any]:
    """The configuration of a pipeline's part, or of a folder that is that part alone."""
    whole = (folder / "model_index.json").is_file()
    return read_config(folder / part / "config.json" if whole else folder / "config.json")


def _differing(part: str, config: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    common = _COMMON[part]
    differing = {}
    for name, value in config.items():
        if name.startswith("_") or (value in (None, False) and not wanted.get(name)) or value in common.get(name, ()):
            continue
        if _plain(value) != _plain(wanted.get(name)) and not (part == "vae" and name == "sample_size"):
            differing[name] = value
    name = str(config.get("_class_name", ""))
    if part == "scheduler" and not _alike(name, str(wanted.get("_class_name"))):
        differing["_class_name"] = name
    return differing


def _alike(one: str, other: str) -> bool:
    """Whether two schedulers are ways of sampling the same model, which a user chooses between."""
    if one.startswith("EDM") or other.startswith("EDM"):
        return one[:3] == other[:3]
    return one == other or bool(_SAMPLERS.fullmatch(one))


def _plain(value: Any) -> Any:
    """8 heads at every level are [8, 8, 8, 8] too."""
    if isinstance(value, (list, tuple)) and value and all(item == value[0] for item in value):
        return value[0]
    return list(value) if isinstance(value, tuple) else value


def _prediction_lost(family: Family, prediction: Prediction) -> dict[str, Any]:
    lost: dict[str, Any] = {}
    if prediction.kind == "sample" or (prediction.kind == "flow" and not family.key.startswith("flux")):
        lost["prediction_type"] = prediction.kind
    if prediction.zero_terminal_snr and "ztsnr" not in marks(family, prediction):
        lost["rescale_betas_zero_snr"] = True
    return lost


def settings_in_words(settings: Mapping[str, Mapping[str, Any]], *, header: bool) -> tuple[str, ...]:
    """One note that names them all, or none; `header` tells whether the file has one that holds them."""
    named = [
        f"{PART_WORDS.get(part, part)}: "
        + ", ".join(f"{'class' if name == '_class_name' else name} {_short(value)}" for name, value in values.items())
        for part, all_values in settings.items()
        # modelspec.resolution says the other
        if (values := {name: value for name, value in all_values.items() if name != "sample_size"})
    ]
    if not named:
        return ()
    kept = (
        " They are kept in its header, for converting it back to a folder."
        if header
        else " They are lost; a .safetensors file would keep them."
    )
    return (f"Web UIs do not read these settings of the folder from a file: {'; '.join(named)}.{kept}",)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def settings_of_file(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The settings that a header keeps; what is not of their form is passed over."""
    try:
        said = json.loads(metadata.get(SETTINGS, "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(said, dict):
        return {}
    return {
        part: {name: value for name, value in values.items() if _allowed(part, name, value)}
        for part, values in said.items()
        if part in (*_PARTS, "scheduler") and isinstance(values, dict)
    }


def _allowed(part: str, name: str, value: Any) -> bool:
    if name == "_class_name":
        return part == "scheduler" and isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z0-9]+Scheduler", value))
    items = value if isinstance(value, list) and len(value) <= 64 else [value]
    plain = all(isinstance(item, (str, int, float, bool)) or item is None for item in items)
    return plain and bool(re.fullmatch(r"[a-z0-9_]+", name)) and not re.fullmatch(_SHOWN, name)


def describe_folder(
    folder: Path, family: Family, widths: Mapping[str, int], prediction: Prediction, metadata: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Add to a file's header what its folder says beyond the weights; returns what was found."""
    vae_of = ""
    if family.parts == ("vae",):
        vae_of, word = _vae_architecture(_config_of(folder, "vae"))
        metadata |= {"modelspec.architecture": word} if word else {}
    settings = settings_of_folder(folder, family, widths, prediction, vae_of=vae_of)
    if settings:
        metadata[SETTINGS] = json.dumps(settings)
    return settings


def resolution_of(folder: Path) -> dict[str, str]:
    """ModelSpec's word for the resolution that a pipeline's configurations name."""
    unet, vae = read_config(folder / "unet" / "config.json"), read_config(folder / "vae" / "config.json")
    sample_size, levels = unet.get("sample_size"), len(vae.get("block_out_channels", ()))
    if isinstance(sample_size, int) and levels:
        side = sample_size * 2 ** (levels - 1)
        return {"modelspec.resolution": f"{side}x{side}"}
    return {}


# ------------------------------------------------------------------------------------------------ a VAE alone

# ModelSpec's word for a model -> the family whose VAE it has.
_VAE_WORDS = (
    (re.compile(r"xl"), "sdxl"),
    (re.compile(r"v3|sd3"), "sd3"),
    (re.compile(r"flux"), "flux"),
    (re.compile(r"stable-diffusion-v[12]"), "sd15"),
)
VAE_ARCHITECTURES = {key: f"{architecture_of(key)}/vae" for key in ("sd15", "sd21", "sdxl", "flux", "sd3")}
_OF_LATENTS = {"vae": ("sd15", "sd21", "sdxl"), "flux-ae": ("flux", "sd3")}


def vae_family(layout: Family, asked: str, metadata: Mapping[str, str]) -> str:
    """Whose VAE a file holds, which sets its scaling: what was asked for, or what the header says; "" if neither."""
    asked = asked.removesuffix("-inpaint").removesuffix("-refiner").removesuffix("-all-in-one")
    said = metadata.get("modelspec.architecture", "").lower()
    words = [family for pattern, family in _VAE_WORDS if pattern.search(said)]
    return next((family for family in (asked, *words[:1]) if family in _OF_LATENTS.get(layout.key, ())), "")


def _vae_architecture(config: Mapping[str, Any]) -> tuple[str, str]:
    """(family, ModelSpec's word) of a VAE's folder by its scaling and shift; empty for one that no family has."""
    factors = (config.get("scaling_factor", 0.18215), config.get("shift_factor") or 0.0)
    wide = config.get("latent_channels", 4) == 16
    for family, architecture in VAE_ARCHITECTURES.items():
        if VAE_FACTORS[family] == factors and wide == (family in _OF_LATENTS["flux-ae"]):
            return family, architecture
    return "", ""


def scaling_unknown(layout: Family) -> str:
    """The note on a VAE whose scaling had to be assumed."""
    assumed, *others = ("flux", "sd3") if layout.key == "flux-ae" else ("sd15", "sdxl")
    (scaling, shift), (other, other_shift) = VAE_FACTORS[assumed], VAE_FACTORS[others[0]]
    names = {"sd15": "Stable Diffusion 1.x and 2.x", "sdxl": "SDXL", "flux": "Flux.1", "sd3": "Stable Diffusion 3"}
    return (
        f"The file does not say which family the VAE belongs to: scaling_factor {scaling}"
        + (f" and shift_factor {shift}" if shift else "")
        + f" of {names[assumed]} {'were' if shift else 'was'} written. "
        + f"{names[others[0]]}'s {'are' if other_shift else 'is'} {other}"
        + (f" and {other_shift}" if other_shift else "")
        + f": specify the family (--family {others[0]})."
    )
