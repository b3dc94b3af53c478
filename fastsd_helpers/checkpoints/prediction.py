"""What a model predicts (noise, or velocity): where it is written down, and how each reader of a file is told.

Weights do not show it. A Diffusers folder says it in its scheduler; a single file in a `.yaml` of the same name (SD 1.x
and 2.x) or in empty tensors (SDXL); ModelSpec metadata too, which web UIs do not read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.checkpoints.layout import Family
from fastsd_helpers.checkpoints.safetensors_file import TensorFact
from fastsd_helpers.errors import CheckpointError

__all__ = [
    "Prediction",
    "marks",
    "prediction_metadata",
    "prediction_of_file",
    "prediction_of_folder",
    "read_config",
    "sidecar",
]


@dataclass(frozen=True)
class Prediction:
    """What a model predicts and how that is known.

    kind: `epsilon`, `v_prediction` or `flow`; None where nothing says it.
    zero_terminal_snr: the noise schedule was rescaled so that its end is pure noise.
    """

    kind: str | None
    source: str
    zero_terminal_snr: bool = False


def prediction_of_folder(folder: Path) -> Prediction:
    """Read a Diffusers folder's scheduler."""
    config = read_config(folder / "scheduler" / "scheduler_config.json")
    kind = config.get("prediction_type")
    if kind is None and "Flow" in str(config.get("_class_name")):
        kind = "flow"
    return Prediction(
        kind or "epsilon" if config else kind,
        "scheduler/scheduler_config.json" if config else "nothing says it",
        bool(config.get("rescale_betas_zero_snr")),
    )


def prediction_of_file(path: Path, family: str, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Prediction:
    """Find what a single file says: empty tensors, a .yaml beside it, metadata; else what its family does."""
    if family.startswith("flux"):
        return Prediction("flow", "Flux.1 models are all flow-matching")
    if "v_pred" in tensors:
        return Prediction("v_prediction", "the tensor 'v_pred'", "ztsnr" in tensors)
    beside = path.with_suffix(".yaml")
    if beside.is_file() and beside.stat().st_size < 1_000_000:
        text = beside.read_text(encoding="utf-8", errors="replace")
        velocity = any(
            line.split("#")[0].replace('"', "").replace("'", "").strip() == "parameterization: v"
            for line in text.splitlines()
        )
        return Prediction("v_prediction" if velocity else "epsilon", f"{beside.name} beside it")
    word = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key")
    if word:
        return Prediction({"v": "v_prediction"}.get(word, word), "its ModelSpec metadata")
    if metadata.get("modelspec.architecture", "").endswith("-768-v"):
        return Prediction("v_prediction", "its ModelSpec metadata")
    if family == "sd21":
        return Prediction(None, "SD 2.x has both kinds, and the file does not say which it is")
    return Prediction("epsilon", "the file says nothing else")


def marks(family: Family, prediction: Prediction) -> dict[str, tuple[TensorFact, bytes]]:
    """The empty tensors that tell ComfyUI and Forge about an SDXL model."""
    if not family.key.startswith("sdxl") or prediction.kind != "v_prediction":
        return {}
    names = ["v_pred"] + (["ztsnr"] if prediction.zero_terminal_snr else [])
    return {name: (TensorFact("F32", (0,)), b"") for name in names}


def prediction_metadata(family: Family, prediction: Prediction, widths: Mapping[str, int]) -> dict[str, str]:
    """ModelSpec's words for it."""
    if family.key.startswith("flux"):
        name = "flux-1-dev" if widths.get("guided", 1) else "flux-1-schnell"
        return {"modelspec.architecture": name, "modelspec.prediction_type": "flow"}
    word = {"v_prediction": "v"}.get(prediction.kind or "", prediction.kind)
    described = {"modelspec.prediction_type": word} if word else {}
    if family.key == "sd21" and word == "v":
        described["modelspec.architecture"] = "stable-diffusion-v2-768-v"
    return described


def sidecar(family: Family, prediction: Prediction, widths: Mapping[str, int]) -> str | None:
    """The text of the .yaml that must lie beside an SD 1.x or 2.x file that predicts velocity; None for others.

    AUTOMATIC1111 takes it for the whole configuration, Forge reads `parameterization` from it. The layout is that of
    Stability-AI/stablediffusion's v2-inference-v.yaml and CompVis/stable-diffusion's v1-inference.yaml.
    """
    if prediction.kind != "v_prediction" or not family.key.startswith(("sd15", "sd21")):
        return None
    second = family.key.startswith("sd21")
    base, encoder_base = widths["u0"], widths["v0"]
    channels = 9 if family.key.endswith("-inpaint") else 4
    target = "ldm.models.diffusion.ddpm." + ("LatentInpaintDiffusion" if channels == 9 else "LatentDiffusion")
    heads = "num_head_channels: 64\n        use_linear_in_transformer: True" if second else "num_heads: 8"
    if second:
        text = "FrozenOpenCLIPEmbedder\n      params:\n        freeze: True\n        layer: penultimate"
    else:
        text = "FrozenCLIPEmbedder"
    return f"""model:
  target: {target}
  params:
    parameterization: "v"
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: jpg
    cond_stage_key: txt
    image_size: 64
    channels: 4
    cond_stage_trainable: False
    conditioning_key: {"hybrid" if channels == 9 else "crossattn"}
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: False

    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        use_checkpoint: True
        image_size: 32
        in_channels: {channels}
        out_channels: 4
        model_channels: {base}
        attention_resolutions: [4, 2, 1]
        num_res_blocks: 2
        channel_mult: [{", ".join(str(widths[f"u{level}"] // base) for level in range(4))}]
        {heads}
        use_spatial_transformer: True
        transformer_depth: 1
        context_dim: {widths["x"]}
        legacy: False

    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig:
          double_z: True
          z_channels: 4
          resolution: 256
          in_channels: 3
          out_ch: 3
          ch: {encoder_base}
          ch_mult: [{", ".join(str(widths[f"v{level}"] // encoder_base) for level in range(4))}]
          num_res_blocks: 2
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity

    cond_stage_config:
      target: ldm.modules.encoders.modules.{text}
"""


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{path} cannot be read.", "Download the model again.") from err
    return config if isinstance(config, dict) else {}
