"""Which name table belongs to which model family, found by its key; parts alone have tables of their own."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from fastsd_helpers.checkpoints.names import flux as names_flux
from fastsd_helpers.checkpoints.names import text_encoders, unet, vae
from fastsd_helpers.checkpoints.names.layout import Family
from fastsd_helpers.checkpoints.names.unet import UNetKind
from fastsd_helpers.errors import CheckpointError

__all__ = ["FAMILY_KEYS", "PART_KEYS", "architecture_of", "find_family"]

_COMPVIS = "https://github.com/CompVis/stable-diffusion"
_STABILITY = "https://github.com/Stability-AI/generative-models"
_STABILITY_2 = "https://github.com/Stability-AI/stablediffusion"
_FLUX = "https://github.com/black-forest-labs/flux"
_ARCHITECTURES = {
    "sd15": "stable-diffusion-v1",
    "sd15-inpaint": "stable-diffusion-v1-inpainting",
    "sd21": "stable-diffusion-v2",
    "sd21-inpaint": "stable-diffusion-v2-inpainting",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-inpaint": "stable-diffusion-xl-v1-base",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
    "sd3": "stable-diffusion-v3-medium",
    "flux": "flux-1-dev",
    "flux-all-in-one": "flux-1-dev",
}
# ModelSpec's words for SD 2.x say what it predicts; for a model that does not say it there is none, and readers go on
# to take these for the model's own word.
_ARCHITECTURES_2 = {"epsilon": "stable-diffusion-v2-512", "v_prediction": "stable-diffusion-v2-768-v"}

# What the original training code kept beside the weights. Readers compute these; a copy rounded to fp16 would
# override theirs.
_SCHEDULE = (
    r"(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod|"
    r"log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|posterior_variance|"
    r"posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2|logvar|denoiser\.sigmas|"
    r"log_sigmas|sigmas|model_ema\.(decay|num_updates))"
)
_POSITION_IDS = r".*\.embeddings\.position_ids|position_ids|embeddings\.position_ids"
_MARKS = r"v_pred|ztsnr|edm_mean|edm_std|edm_vpred\.sigma_(max|min)"  # they say what a model predicts
_TRAINING = r"first_stage_model\.loss\..*|loss\..*"  # the discriminator of the VAE's training
# Of the CLIP that the first text encoder was taken from; the images are made without it.
_CLIP_HEADS = (
    r"(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?(text_model\.)?"
    r"(logit_scale|text_projection(\.weight)?)"
)
_LEFT_OUT = (_SCHEDULE, _POSITION_IDS, _MARKS, _TRAINING, _CLIP_HEADS)

_SD1_TEXT = "cond_stage_model.transformer.text_model."
_SD2_TEXT = "cond_stage_model.model."
_SDXL_L = "conditioner.embedders.0.transformer.text_model."
_SDXL_G = "conditioner.embedders.1.model."
_REFINER_G = "conditioner.embedders.0.model."
_CLIP = {"text_encoder": text_encoders.CLIP_SPELLINGS, "vae": vae.VAE_SPELLINGS}
_CLIP_2 = {**_CLIP, "text_encoder_2": text_encoders.CLIP_SPELLINGS}


def _stable_diffusion(
    key: str, title: str, kind: UNetKind, texts: Mapping[str, str], *, width: str, left_out: str = "", **rest: Any
) -> Family:
    """A family of a U-Net, a VAE and text encoders (part -> prefix); `width` is that of their output together."""
    rows = [*unet.unet_rows(kind), *vae.vae_rows("first_stage_model.")]
    measured = unet.measured_unet(kind) | vae.measured_vae()
    for part, prefix in texts.items():
        if part == "text_encoder_2":
            rows += text_encoders.open_clip_rows(part, prefix, layers=32, letter="g", projection=True)
        elif prefix == _SD2_TEXT:
            rows += text_encoders.open_clip_rows(part, prefix, layers=23)
        else:
            rows += text_encoders.clip_rows(part, prefix, layers=12)
        measured |= text_encoders.measured_clip(part, "g" if part == "text_encoder_2" else "")
    inpainting = kind.channels == 9
    return Family(
        key=key + "-inpaint" * inpainting,
        title=title + " inpainting" * inpainting,
        parts=("unet", "vae", *texts),
        rows=tuple(rows),
        spellings=_CLIP_2,
        ignored={
            part: text_encoders.CLIP_IGNORED if part == "text_encoder_2" else text_encoders.CLIP_UNUSED
            for part in texts
        },
        measured=measured,
        same=(("x", width),),
        left_out=(*_LEFT_OUT, left_out) if left_out else _LEFT_OUT,
        **rest,
    )


def _sd15(channels: int = 4) -> Family:
    return _stable_diffusion(
        "sd15",
        "SD 1.5",
        UNetKind((1, 1, 1, 0), 1, channels=channels),
        {"text_encoder": _SD1_TEXT},
        width="h",
        metadata=_metadata("sd15" + _inpaint(channels), _COMPVIS, 512),
        # Some exporters left `text_model.` out when transformers 5 did.
        original_spellings=(("cond_stage_model.transformer.", _SD1_TEXT),),
    )


def _sd21(channels: int = 4) -> Family:
    return _stable_diffusion(
        "sd21",
        "SD 2.1" if channels == 4 else "SD 2",
        UNetKind((1, 1, 1, 0), 1, channels=channels, linear=True),
        {"text_encoder": _SD2_TEXT},
        width="h",
        # Trained at 512 and at 768 px; those for inpainting at 512.
        metadata=_metadata("sd21" + _inpaint(channels), _STABILITY_2, None if channels == 4 else 512),
        left_out=_literal(_SD2_TEXT) + "attn_mask",
        # The model reads the 23rd of 24 layers; Diffusers keeps no more than that.
        extras=(_literal(_SD2_TEXT) + r"(text_projection|logit_scale|transformer\.resblocks\.23\..*)",),
    )


def _sdxl(channels: int = 4) -> Family:
    return _stable_diffusion(
        "sdxl",
        "SDXL",
        UNetKind((0, 2, 10), 10, channels=channels, linear=True, added=True),
        {"text_encoder": _SDXL_L, "text_encoder_2": _SDXL_G},
        width="h+gh",
        metadata=_metadata("sdxl" + _inpaint(channels), _STABILITY, 1024),
        original_spellings=(("conditioner.embedders.0.transformer.", _SDXL_L),),
        extras=(_literal(_SDXL_G) + "logit_scale",),
    )


def _sdxl_refiner() -> Family:
    return _stable_diffusion(
        "sdxl-refiner",
        "SDXL refiner",
        UNetKind((0, 4, 4, 0), 4, linear=True, added=True),
        {"text_encoder_2": _REFINER_G},
        width="gh",
        metadata=_metadata("sdxl-refiner", _STABILITY, 1024),
        extras=(_literal(_REFINER_G) + "logit_scale",),
    )


def _flux() -> Family:
    return Family(
        key="flux",
        title="Flux.1",
        parts=("transformer",),
        rows=tuple(names_flux.transformer_rows("")),
        measured=names_flux.measured_transformer(),
        metadata=_metadata("flux", _FLUX, 1024),
        original_spellings=(("model.diffusion_model.", ""),),
    )


def _flux_all_in_one() -> Family:
    clip, t5 = "text_encoders.clip_l.transformer.text_model.", "text_encoders.t5xxl.transformer."
    return Family(
        key="flux-all-in-one",
        title="Flux.1 with text encoders and VAE",
        parts=("transformer", "vae", "text_encoder", "text_encoder_2"),
        rows=(
            *names_flux.transformer_rows("model.diffusion_model."),
            *vae.vae_rows("vae.", flux=True),
            *text_encoders.clip_rows("text_encoder", clip, layers=12),
            *text_encoders.t5_rows("text_encoder_2", t5, layers=24, letter="t"),
        ),
        spellings=_CLIP,
        ignored={
            "text_encoder": text_encoders.CLIP_UNUSED,
            "text_encoder_2": frozenset({"encoder.embed_tokens.weight"}),
        },
        measured={
            **names_flux.measured_transformer(),
            **vae.measured_vae(),
            **text_encoders.measured_clip("text_encoder"),
            **text_encoders.measured_t5("text_encoder_2", "t"),
        },
        same=(("c", "th"), ("p", "h")),
        metadata=_metadata("flux", _FLUX, 1024),
        # Writers of such files differ in which of T5's two names for one table they keep.
        left_out=(
            _POSITION_IDS,
            _literal(t5) + r"encoder\.embed_tokens\.weight",
            r".*\.(logit_scale|text_projection.*)",
        ),
    )


def _vae(flux: bool) -> Family:
    return Family(
        key="flux-ae" if flux else "vae",
        title="the VAE of Flux.1" if flux else "the VAE of Stable Diffusion",
        parts=("vae",),
        rows=tuple(vae.vae_rows("", flux=flux)),
        spellings={"vae": vae.VAE_SPELLINGS},
        measured=vae.measured_vae(),
        original_spellings=(("first_stage_model.", ""), ("vae.", "")),
        left_out=_LEFT_OUT,
    )


def _clip(key: str, title: str, layers: int, projection: bool) -> Family:
    part = "text_encoder_2" if key == "clip-g" else "text_encoder"
    # A text encoder alone keeps Hugging Face's names in every web UI, and the prefix.
    rows = text_encoders.clip_rows(
        part, "text_model.", layers=layers, projection="text_projection.weight" if projection else ""
    )
    return Family(
        key=key,
        title=title,
        parts=(part,),
        rows=tuple(rows),
        spellings=_CLIP_2,
        ignored={part: text_encoders.CLIP_IGNORED if projection else text_encoders.CLIP_UNUSED},
        measured=text_encoders.measured_clip(part),
        original_spellings=tuple((plain, long) for long, plain in text_encoders.CLIP_SPELLINGS),
        left_out=(_POSITION_IDS, "logit_scale") if projection else (_POSITION_IDS,),
        # What Stable Diffusion 3 reads and the models here do not: kept in a file, left out of a folder.
        extras=() if projection else (r"(text_model\.)?(text_projection(\.weight)?|logit_scale)",),
    )


def _t5() -> Family:
    return Family(
        key="t5",
        title="Flux.1's T5 text encoder",
        parts=("text_encoder_2",),
        rows=tuple(text_encoders.t5_rows("text_encoder_2", "", layers=24)),
        ignored={"text_encoder_2": frozenset({"encoder.embed_tokens.weight"})},
        measured=text_encoders.measured_t5("text_encoder_2"),
        left_out=(r"encoder\.embed_tokens\.weight",),
    )


def _literal(text: str) -> str:
    """Take a prefix literally inside a pattern."""
    return text.replace(".", r"\.")


def _inpaint(channels: int) -> str:
    return "" if channels == 4 else "-inpaint"


def _metadata(key: str, implementation: str, side: int | None) -> dict[str, str]:
    return {
        "modelspec.architecture": architecture_of(key),
        "modelspec.implementation": implementation,
        **({"modelspec.resolution": f"{side}x{side}"} if side else {}),
    }


def architecture_of(key: str, predicts: str | None = None) -> str:
    """ModelSpec's word for a family's models, or those that predict `epsilon` or `v_prediction`.

    Source: the ModelSpec standard, Stability-AI/ModelSpec.
    """
    return _ARCHITECTURES_2.get(predicts or "", _ARCHITECTURES[key]) if key == "sd21" else _ARCHITECTURES[key]


_TABLES: dict[str, Callable[[], Family]] = {
    "sd15": _sd15,
    "sd15-inpaint": lambda: _sd15(9),
    "sd21": _sd21,
    "sd21-inpaint": lambda: _sd21(9),
    "sdxl": _sdxl,
    "sdxl-inpaint": lambda: _sdxl(9),
    "sdxl-refiner": _sdxl_refiner,
    "flux": _flux,
    "flux-all-in-one": _flux_all_in_one,
    "vae": lambda: _vae(False),
    "flux-ae": lambda: _vae(True),
    "clip-l": lambda: _clip("clip-l", "the CLIP-L text encoder", 12, False),
    "clip-h": lambda: _clip("clip-h", "SD 2.x's text encoder", 23, False),
    "clip-g": lambda: _clip("clip-g", "SDXL's second text encoder", 32, True),
    "t5": _t5,
}
PART_KEYS = ("vae", "flux-ae", "clip-l", "clip-h", "clip-g", "t5")
FAMILY_KEYS = tuple(key for key in _TABLES if key not in PART_KEYS)


@cache
def find_family(key: str) -> Family:
    """Look up a family's name table; raises CheckpointError for a family that has none."""
    if key not in _TABLES:
        raise CheckpointError(
            f"There is no checkpoint layout for the model family {key!r}.",
            f"Families that can be written: {', '.join(sorted(_TABLES))}.",
        )
    return _TABLES[key]()
