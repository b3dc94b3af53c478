"""What a model predicts (noise, velocity, ...): where it is written down, and how each reader of a file is told.

Weights do not show it. A Diffusers folder says it in its scheduler; a single file in a `.yaml` of the same name (SD 1.x
and 2.x) or in small tensors (SDXL); ModelSpec metadata too, which web UIs do not read.
"""

import importlib.resources
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.formats.sources import Source, read_whole
from fastsd_helpers.checkpoints.names.families import architecture_of
from fastsd_helpers.checkpoints.names.layout import Family
from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.registry import PREDICT_EITHER

__all__ = [
    "MARKS",
    "Edm",
    "Prediction",
    "marks",
    "prediction_metadata",
    "prediction_of_file",
    "prediction_of_folder",
    "read_config",
    "sidecar",
    "unsaid_prediction",
]

# Small tensors beside the weights that tell ComfyUI and Forge about an SDXL model.
MARKS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
_FORMATS = {"F16": "e", "F32": "f", "F64": "d"}
_WORDS = {"v": "v_prediction", "eps": "epsilon", "x0": "sample"}
_KINDS = ("epsilon", "v_prediction", "sample", "flow")


@dataclass(frozen=True)
class Edm:
    """Noise levels in the sense of Karras et al. 2022, where a model was trained on those.

    sigma_data: the spread of what it was trained on; 0.5 in Playground v2.5, 1.0 in CosXL.
    mean, std: of the latents, one value per channel, where they are normalised (Playground); empty otherwise.
    """

    sigma_min: float
    sigma_max: float
    sigma_data: float
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """What a model predicts and how that is known.

    kind: `epsilon`, `v_prediction`, `sample`, `flow`, `edm` (Playground v2.5) or `edm_v_prediction` (CosXL); None
        where nothing says it.
    zero_terminal_snr: the noise schedule was rescaled so that its end is pure noise.
    edm: the noise levels, with the two kinds of that name.
    """

    kind: str | None
    source: str
    zero_terminal_snr: bool = False
    edm: Edm | None = None


def prediction_of_folder(folder: Path, family: str) -> Prediction:
    """Read the scheduler of a Diffusers folder of a family, and its VAE where the noise is EDM's.

    Raises:
        CheckpointError: a file of it cannot be read.
    """
    config = read_config(folder / "scheduler" / "scheduler_config.json")
    kind, source = config.get("prediction_type"), "scheduler/scheduler_config.json"
    if str(config.get("_class_name")).startswith("EDM"):
        vae = read_config(folder / "vae" / "config.json")
        least, most = float(config.get("sigma_min", 0.002)), float(config.get("sigma_max", 80.0))
        mean, std = _four(vae.get("latents_mean")), _four(vae.get("latents_std"))
        edm = Edm(least, most, float(config.get("sigma_data", 0.5)), *((mean, std) if mean and std else ()))
        if kind == "v_prediction" and not edm.mean:
            return Prediction("edm_v_prediction", source, edm=edm)
        if edm.mean and kind in (None, "epsilon"):
            return Prediction("edm", source, edm=edm)
    if kind is None and "Flow" in str(config.get("_class_name")):
        kind = "flow"
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    if kind is None and config:
        return replace(unsaid_prediction(family), zero_terminal_snr=zero_snr)
    return Prediction(kind, source if config else "nothing says it", zero_snr)


def _four(values: Any) -> tuple[float, ...]:
    if not isinstance(values, list) or not values or not all(isinstance(value, (int, float)) for value in values):
        return ()
    return tuple(float(value) for value in values)


def prediction_of_file(path: Path, family: str, source: Source) -> Prediction:
    """Find what a single file says: small tensors, a .yaml beside it, metadata; else what its family does.

    Raises:
        CheckpointError: the tensors with EDM's mean and deviation are not such numbers.
    """
    tensors, metadata = source.tensors, source.metadata
    if family.startswith("flux"):
        return unsaid_prediction(family)
    if "edm_mean" in tensors and "edm_std" in tensors:
        mean, std = _floats(source, "edm_mean", 4), _floats(source, "edm_std", 4, positive=True)
        return Prediction("edm", "the tensors 'edm_mean' and 'edm_std'", edm=Edm(0.002, 80.0, 0.5, mean, std))
    if "edm_vpred.sigma_max" in tensors:
        (largest,) = _floats(source, "edm_vpred.sigma_max", 1, positive=True)
        smallest = 0.002
        if "edm_vpred.sigma_min" in tensors:
            (smallest,) = _floats(source, "edm_vpred.sigma_min", 1, positive=True)
        return Prediction(
            "edm_v_prediction", "the tensor 'edm_vpred.sigma_max'", edm=Edm(_short(smallest), _short(largest), 1.0)
        )
    zero_snr = "ztsnr" in tensors
    if "v_pred" in tensors:
        return Prediction("v_prediction", "the tensor 'v_pred'", zero_snr)
    beside = path.with_suffix(".yaml")
    if beside.is_file() and beside.stat().st_size < 1_000_000:
        text = beside.read_text(encoding="utf-8", errors="replace")
        said = {line.split("#")[0].replace('"', "").replace("'", "").strip() for line in text.splitlines()}
        kind = "v_prediction" if "parameterization: v" in said else "epsilon"
        return Prediction("sample" if "parameterization: x0" in said else kind, f"{beside.name} next to it", zero_snr)
    word = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key")
    if word and _WORDS.get(word, word) in _KINDS:
        return Prediction(_WORDS.get(word, word), "its ModelSpec metadata", zero_snr)
    if metadata.get("modelspec.architecture", "").endswith("-768-v"):
        return Prediction("v_prediction", "its ModelSpec metadata", zero_snr)
    return replace(unsaid_prediction(family), zero_terminal_snr=zero_snr)


def unsaid_prediction(family: str) -> Prediction:
    """What a model of a family predicts that says nothing of it."""
    if family.startswith("flux"):
        return Prediction("flow", "Flux.1 models are all flow-matching")
    if family in PREDICT_EITHER:
        return Prediction(None, "such models exist with both, and this one does not say which it is")
    return Prediction("epsilon", "the default, as the model says nothing else")


def _floats(source: Source, name: str, count: int, *, positive: bool = False) -> tuple[float, ...]:
    fact = source.tensors[name]
    if fact.count == count and fact.dtype in (*_FORMATS, "BF16"):
        content = read_whole(source, name)
        if fact.dtype == "BF16":
            content = bytearray(b"".join(b"\0\0" + content[at : at + 2] for at in range(0, len(content), 2)))
        values = struct.unpack(f"<{count}{_FORMATS.get(fact.dtype, 'f')}", content)
        if all(math.isfinite(value) and (value > 0 or not positive) for value in values):
            return tuple(_short(value) for value in values)
    what = f"{count} numbers{' above 0' if positive else ''}"
    raise CheckpointError(
        f"The tensor {name!r}, which holds the model's noise levels, is not {what}.", "Download the model again."
    )


def _short(value: float) -> float:
    """A number of 32 bits as it was written, 1.886 and not 1.8860000371932983."""
    return float(f"{value:.7g}")


def marks(family: Family, prediction: Prediction) -> dict[str, tuple[TensorFact, bytes]]:
    """The small tensors that tell ComfyUI and Forge about an SDXL model."""
    if not family.key.startswith("sdxl"):
        return {}
    edm = prediction.edm
    if edm is not None and edm.mean:
        shape = (1, len(edm.mean), 1, 1)
        found = (("edm_mean", edm.mean), ("edm_std", edm.std))
        return {name: (TensorFact("F32", shape), struct.pack(f"<{len(values)}f", *values)) for name, values in found}
    if edm is not None:
        levels = (("edm_vpred.sigma_max", edm.sigma_max), ("edm_vpred.sigma_min", edm.sigma_min))
        return {name: (TensorFact("F32", ()), struct.pack("<f", value)) for name, value in levels}
    if prediction.kind != "v_prediction":
        return {}
    names = ["v_pred"] + (["ztsnr"] if prediction.zero_terminal_snr else [])
    return {name: (TensorFact("F32", (0,)), b"") for name in names}


def prediction_metadata(family: Family, prediction: Prediction, widths: Mapping[str, int]) -> dict[str, str]:
    """ModelSpec's words for it."""
    if family.key.startswith("flux"):
        name = "flux-1-dev" if widths.get("guided", 1) else "flux-1-schnell"
        return {"modelspec.architecture": name, "modelspec.prediction_type": "flow"}
    word = {"v_prediction": "v", "edm_v_prediction": "v", "edm": "epsilon"}.get(prediction.kind or "", prediction.kind)
    described = {"modelspec.prediction_type": word} if word else {}
    if family.key == "sd21":
        described["modelspec.architecture"] = architecture_of("sd21", prediction.kind)
    return described


def sidecar(family: Family, prediction: Prediction, widths: Mapping[str, int]) -> str | None:
    """The text of the .yaml that must lie beside an SD 1.x or 2.x file that predicts velocity; None for others.

    AUTOMATIC1111 takes it for the whole configuration, Forge reads `parameterization` from it. The layout, in
    v_prediction.yaml, is that of Stability-AI/stablediffusion's v2-inference-v.yaml and CompVis/stable-diffusion's
    v1-inference.yaml.
    """
    if prediction.kind != "v_prediction" or not family.key.startswith(("sd15", "sd21")):
        return None
    second = family.key.startswith("sd21")
    base, encoder_base = widths["u0"], widths["v0"]
    channels = 9 if family.key.endswith("-inpaint") else 4
    target = "ldm.models.diffusion.ddpm." + ("LatentInpaintDiffusion" if channels == 9 else "LatentDiffusion")
    heads = "num_head_channels: 64\n        use_linear_in_transformer: True" if second else "num_heads: 8"
    encoder = "FrozenCLIPEmbedder"
    if second:
        encoder = "FrozenOpenCLIPEmbedder\n      params:\n        freeze: True\n        layer: penultimate"
    text = importlib.resources.files("fastsd_helpers").joinpath("v_prediction.yaml").read_text(encoding="utf-8")
    return text.format(
        target=target,
        conditioning="hybrid" if channels == 9 else "crossattn",
        channels=channels,
        base=base,
        unet_levels=", ".join(str(widths[f"u{level}"] // base) for level in range(4)),
        heads=heads,
        context=widths["x"],
        encoder_base=encoder_base,
        vae_levels=", ".join(str(widths[f"v{level}"] // encoder_base) for level in range(4)),
        text=encoder,
    )


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        CheckpointError: it cannot be read, or is not an object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{path} cannot be read.", "Download the model again.") from err
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object.", "Download the model again.")
    return config
