"""The models this project knows: models.toml as ModelSpec rows, and what kind of model a Diffusers folder is."""

import difflib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fastsd_helpers.downloads import models_table, read_json, require_pipeline
from fastsd_helpers.downloads.pipeline import Listing
from fastsd_helpers.errors import ModelError, ModelNotFound, SettingsError, WrongFamily

__all__ = [
    "TRAINABLE_FAMILIES",
    "ModelSpec",
    "Source",
    "check_resolution",
    "detect_family",
    "family_of",
    "find_model",
    "models",
    "require_trainable",
    "require_trainable_key",
    "spec_of",
]

TRAINABLE_FAMILIES = ("sd15", "sd21", "sdxl")
# Their models predict noise or velocity: what a model of theirs does not say is asked, and never written down for it.
PREDICT_EITHER = ("sd21", "sdxl")

# The block layout that a family's single-file layout is written for: a U-Net with fewer blocks would train for an
# hour and could then not be exported. Source: the unet/config.json of the published models.
_SD_BLOCKS = (("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, 2, 1)
_XL_BLOCKS = (
    ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    2,
    [1, 2, 10],
)
_BLOCKS = {"sd15": _SD_BLOCKS, "sd21": _SD_BLOCKS, "sdxl": _XL_BLOCKS}


# Models that were trained on other noise, or distilled to a few steps, learn nothing useful from the usual objective.
_OTHER_SCHEDULES = ("EDM", "LCM", "TCD")
_OTHER_SCHEDULES_WORDS = (
    "it was trained on other noise levels, or distilled to a few steps, and what is trained here would break that; "
    "train on the model it was made from, and use the LoRA with this one"
)


@dataclass(frozen=True)
class Source:
    """One place a model can be fetched from: a Hub repository, at a commit when `revision` pins one."""

    repo: str
    revision: str | None = None


@dataclass(frozen=True)
class ModelSpec:
    """One model: what it is, where it comes from, which images it takes and its default settings."""

    key: str
    title: str
    family: str
    # text: a reader; none: a VAE and such; unknown: nothing in the model says it
    prediction_type: Literal["epsilon", "v_prediction", "flow", "text", "none", "unknown"]
    native_px: int  # side of the images it was made with
    min_px: int
    max_px: int
    multiple: int  # sides are multiples of this
    licence: str
    licence_page: str
    gated: bool = False
    checked: str = "never"  # date of the last comparison with the Hub
    sources: tuple[Source, ...] = ()
    former: tuple[str, ...] = ()
    folder: str | None = None  # inside the package, instead of sources
    checkpoint: dict[str, Any] | None = None  # repo, file, bytes, sha256, ... of the single file
    defaults: dict[str, Any] = field(default_factory=dict)
    kind: Literal["base", "reader", "checkpoint", "diffusion-model", "vae", "text-encoder", "embedding", "upscaler"] = (
        "base"
    )
    sizes: tuple[str, ...] = ()  # keys of the same weights in other dtypes, the largest first
    about_bytes: int | None = None  # rounded size of a whole download
    vram_gb: dict[str, float] = field(default_factory=dict)  # smallest GPU (decimal GB) per use: draw, lora, full
    note: str = ""
    zero_terminal_snr: bool = False  # the noise schedule was rescaled to end in pure noise
    quality: str = ""  # words that a prompt begins with, as the model was trained

    @property
    def trainable(self) -> bool:
        """Whether DreamBooth can train this family in this version."""
        return self.family in TRAINABLE_FAMILIES

    @property
    def bytes(self) -> int | None:
        """Size of its single file or of the whole download, exact or about; None when nobody published it."""
        about = self.checkpoint or {}
        return about.get("bytes", about.get("about_bytes", self.about_bytes))


def models(kind: str | None = "base") -> list[ModelSpec]:
    """List the known models of a kind in the order of models.toml.

    Args:
        kind: base (what training and drawing start from), reader (handwriting), checkpoint, diffusion-model, vae,
            text-encoder, embedding, upscaler (single files that web UIs use); None for all.

    Returns:
        Their rows.
    """
    return [spec for spec in _specs().values() if kind is None or spec.kind == kind]


def find_model(key: str) -> ModelSpec:
    """Look up a registry key; raises ModelNotFound with the valid keys.

    Args:
        key: such as `sd15`.

    Returns:
        Its row.
    """
    spec = _specs().get(key)
    if spec is None:
        close = difflib.get_close_matches(key.strip().lower(), _specs(), n=1)
        guess = f"Did you mean '{close[0]}'? " if close else ""
        raise ModelNotFound(f"No model has the key '{key}'.", f"{guess}The keys are {', '.join(_specs())}.")
    return spec


def _specs() -> dict[str, ModelSpec]:
    return {key: _spec_from(key, row) for key, row in models_table().items()}


def _spec_from(key: str, row: dict[str, Any]) -> ModelSpec:
    lists = {name: tuple(row.get(name, ())) for name in ("former", "sizes")}
    sources = tuple(Source(**source) for source in row.get("sources", ()))
    own = {"resolution": row["native_px"]} if row.get("kind", "base") == "base" else {}
    return ModelSpec(key=key, **{**row, **lists, "sources": sources, "defaults": own | row.get("defaults", {})})


# ------------------------------------------------------------------------------------------ what a folder is


def detect_family(folder: Path) -> str:
    """Tell a Diffusers folder's family from its structure: sd15, sd15-inpaint, sd21, sdxl, sdxl-refiner, flux, ...

    Widths do not matter (the demo model is an sd15) and weights are not opened.

    Args:
        folder: a Diffusers folder.

    Returns:
        The family's key.

    Raises:
        ModelNotFound: there is no such folder.
        ModelError: it is a ControlNet, a VAE, a LoRA, a single file, empty or not whole.
        WrongFamily: a whole pipeline of a kind this project does not know.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ModelError(f"{folder} is a single file.", "Give the Diffusers folder, not a file.")
    if not folder.is_dir():
        raise ModelNotFound(f"There is no folder {folder}.", "Check the path, or choose a key such as 'sd15'.")
    require_pipeline(folder)
    return family_of(Listing.of_folder(folder))


def family_of(listing: Listing) -> str:
    """Tell the family of a whole Diffusers pipeline, here or on the Hub, from its small files; as `detect_family`.

    Args:
        listing: the pipeline's small files and the names of the others.

    Returns:
        The family's key.
    """
    index = listing.read("model_index.json")
    if _has(index, "transformer"):
        return _family_of_transformer(listing, index)
    return _family_of_unet(listing, index)


def _family_of_transformer(listing: Listing, index: dict[str, Any]) -> str:
    kind = str(listing.read("transformer/config.json").get("_class_name") or index["transformer"][1])
    if kind == "FluxTransformer2DModel" and _has(index, "text_encoder_2"):
        return "flux"
    raise _unknown_kind(listing.where, f"its transformer is a {kind}")


def _family_of_unet(listing: Listing, index: dict[str, Any]) -> str:
    config = listing.read("unet/config.json")
    kind = str(config.get("_class_name") or index["unet"][1])
    if kind != "UNet2DConditionModel":
        raise _unknown_kind(listing.where, f"its U-Net is a {kind}")
    for name in ("class_embed_type", "num_class_embeds", "time_cond_proj_dim", "encoder_hid_dim_type"):
        if config.get(name) is not None:
            raise _unknown_kind(listing.where, f"its U-Net has {name} = {config[name]!r}")
    task = {4: "", 9: "-inpaint"}.get(config.get("in_channels", 4))
    if task is None:
        raise _unknown_kind(listing.where, f"its U-Net takes {config['in_channels']} channels, not 4 or 9")
    addition = config.get("addition_embed_type")
    if addition == "text_time" and _has(index, "text_encoder_2"):
        return "sdxl" + task if _has(index, "text_encoder") else "sdxl-refiner"
    if addition is not None:
        raise _unknown_kind(listing.where, f"its U-Net has addition_embed_type = {addition!r}")
    if not _has(index, "text_encoder") or _has(index, "text_encoder_2"):
        raise _unknown_kind(listing.where, "it does not have exactly one text encoder")
    if config.get("cross_attention_dim") is None:
        raise _unknown_kind(listing.where, "its U-Net has no cross-attention")
    return ("sd21" if config.get("use_linear_projection") else "sd15") + task


def _has(index: dict[str, Any], part: str) -> bool:
    return bool(isinstance(index.get(part), list) and index[part] and index[part][0])


def _unknown_kind(where: Path | str, reason: str) -> WrongFamily:
    families = ", ".join(sorted({spec.family for spec in models()}))
    return WrongFamily(f"{where} is an unsupported kind of model: {reason}.", f"Known families: {families}.")


def require_trainable(model: Path | Listing) -> str:
    """Return the family of a folder or listing that DreamBooth can train, or raise WrongFamily with what works.

    Args:
        model: a Diffusers folder, or a listing of one on the Hub.

    Returns:
        The family's key.
    """
    family = family_of(model) if isinstance(model, Listing) else detect_family(model)
    listing = model if isinstance(model, Listing) else Listing.of_folder(model)
    where, hint = listing.where, _trainable_hint()
    if family not in TRAINABLE_FAMILIES:
        raise WrongFamily(f"{where} is a {family} model, which DreamBooth here cannot train yet.", hint)
    unet, vae = listing.read("unet/config.json"), listing.read("vae/config.json")
    down, up = tuple(unet.get("down_block_types", ())), tuple(unet.get("up_block_types", ()))
    depths = unet.get("transformer_layers_per_block", 1)
    if (down, up, unet.get("layers_per_block", 2), depths) != _BLOCKS[family]:
        raise WrongFamily(
            f"{where} has a shortened U-Net ({len(down)} down blocks, {unet.get('layers_per_block', 2)} layers each): "
            "no single-file layout exists for it.",
            hint,
        )
    if len(vae.get("block_out_channels", ())) != 4 or vae.get("latent_channels", 4) != 4:
        raise WrongFamily(f"{where} has a VAE of another shape than Stable Diffusion's.", hint)
    kind = str(listing.read("scheduler/scheduler_config.json").get("_class_name", ""))
    if kind.startswith(_OTHER_SCHEDULES):
        raise WrongFamily(f"{where} is made for {kind}: {_OTHER_SCHEDULES_WORDS}.", hint)
    return family


def require_trainable_key(spec: ModelSpec) -> None:
    """Raise WrongFamily for a known model that DreamBooth cannot train, as `require_trainable` does for its folder.

    Args:
        spec: the row of a key.
    """
    if not spec.trainable:
        raise WrongFamily(
            f"'{spec.key}' is a {spec.family} model, which DreamBooth here cannot train yet.", _trainable_hint()
        )


def _trainable_hint() -> str:
    keys = ", ".join(f"'{spec.key}'" for spec in models() if spec.trainable)
    return f"Choose one of the keys {keys}, or any fine-tune of Stable Diffusion 1.5, 2.1 or XL as a Hub id or folder."


def spec_of(ref: str, folder: Path) -> ModelSpec:
    """Describe the model at `folder` that the user named `ref`: the registry row, or the nearest row fitted to it.

    For a Hub id or a folder, the family, native resolution and prediction type are read from the folder's configs;
    defaults and limits come from the row of the same family with the nearest native resolution.

    Args:
        ref: as the user named it: key, Hub id or path.
        folder: where it lies here.

    Returns:
        Family, sizes, prediction type, limits and defaults.
    """
    if ref in _specs():
        return find_model(ref)
    family = detect_family(folder)
    base = family.removesuffix("-inpaint").removesuffix("-refiner")
    rows = [spec for spec in models() if spec.family == family] or [spec for spec in models() if spec.family == base]
    native_px = _native_px(folder)
    if native_px is None:
        nearest = max(rows, key=lambda spec: spec.native_px)
        native_px = nearest.native_px
    else:
        nearest = min(rows, key=lambda spec: abs(math.log(spec.native_px / native_px)))
    prediction, zero_snr = nearest.prediction_type, False
    if base != "flux":
        schedule = read_json(folder, "scheduler/scheduler_config.json")
        prediction = schedule.get("prediction_type", "unknown" if base in PREDICT_EITHER else "epsilon")
        if prediction not in ("epsilon", "v_prediction", "unknown"):
            raise _unknown_kind(folder, f"its scheduler has prediction_type = {prediction!r}")
        zero_snr = base == "sdxl" and schedule.get("rescale_betas_zero_snr") is True
    least, most = nearest.min_px, nearest.max_px
    if native_px != nearest.native_px:
        step = nearest.multiple
        least, most = max(step, native_px // 2 // step * step), 2 * native_px
    return replace(
        nearest,
        key=ref,
        title=Path(ref).name or ref,
        family=family,
        prediction_type=prediction,
        zero_terminal_snr=zero_snr,
        quality="",
        native_px=native_px,
        licence="unknown",
        licence_page="",
        gated=False,
        sources=(),
        former=(),
        folder=None,
        checkpoint=None,
        defaults={**nearest.defaults, "resolution": native_px},
        min_px=least,
        max_px=most,
    )


def _native_px(folder: Path) -> int | None:
    """Pixels of the latent size the U-Net was configured for; None for models that record none (Flux)."""
    if not (folder / "unet" / "config.json").is_file():
        return None
    size = read_json(folder, "unet/config.json").get("sample_size")
    blocks = len(read_json(folder, "vae/config.json").get("block_out_channels", ()))
    return size * 2 ** (blocks - 1) if isinstance(size, int) and size > 0 and blocks else None


# ------------------------------------------------------------------------------------------------ resolution


def check_resolution(spec: ModelSpec, px: int, *, setting: str = "resolution") -> list[str]:
    """Check the side of the training images for a model.

    Args:
        spec: the model.
        px: the side in pixels.
        setting: the name of what it was given as.

    Returns:
        Warnings for a size that works but is not what the model was made for.

    Raises:
        SettingsError: the size is out of range or not a multiple; the hint names the nearest sizes that work.
    """
    what = f"{setting} (--{setting}) {'is' if setting == 'resolution' else 'has'} {px}"
    if isinstance(px, bool) or not isinstance(px, int):
        raise SettingsError(
            f"resolution (--resolution) is {px!r}; it must be an integer.", _sizes(spec, spec.native_px)
        )
    if px < spec.min_px:
        raise SettingsError(f"{what}; the smallest for {spec.title} is {spec.min_px}.", _sizes(spec, px))
    if px > spec.max_px:
        raise SettingsError(f"{what}; the largest for {spec.title} is {spec.max_px}.", _sizes(spec, px))
    if px % spec.multiple:
        raise SettingsError(f"{what}; for {spec.title} it must be a multiple of {spec.multiple}.", _sizes(spec, px))
    if px == spec.native_px:
        return []
    if px < spec.native_px:
        reason = "smaller images train faster but lose detail and blur the model's results"
    else:
        reason = (
            f"larger images take about {(px / spec.native_px) ** 2:.1f} times the memory and time, "
            "and the model may repeat the subject in them"
        )
    return [
        f"{what}, but {spec.title} was trained at {spec.native_px} px: {reason}. {spec.native_px} is the safe choice."
    ]


def _sizes(spec: ModelSpec, px: int) -> str:
    """Name the valid sizes around `px` and the native one."""
    inside = min(max(px, spec.min_px), spec.max_px)
    below, above = (math.floor(inside / spec.multiple), math.ceil(inside / spec.multiple))
    near = sorted({size * spec.multiple for size in (below, above)} & set(range(spec.min_px, spec.max_px + 1)))
    choice = " or ".join(str(size) for size in near)
    native = "" if spec.native_px in near else f", or {spec.native_px}, which the model was trained at"
    return f"Choose {choice}{native}."
