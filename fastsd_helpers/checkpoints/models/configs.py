"""The configuration files of a Diffusers folder, written from a family's structure and a model's widths.

Numbers that weights do not show (attention heads, the noise schedule) are those of the published models.

Source: the config.json files of stable-diffusion-v1-5, stable-diffusion-2-1, SDXL base and refiner 1.0, and Flux.1.
"""

from collections.abc import Mapping
from typing import Any

from fastsd_helpers.checkpoints.formats.prediction import Prediction
from fastsd_helpers.checkpoints.names.layout import Family
from fastsd_helpers.registry import PREDICT_EITHER

__all__ = ["VAE_FACTORS", "WEIGHT_NAMES", "component_config", "guessed_heads", "model_index", "scheduler_config"]

WEIGHT_NAMES = {
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
_PIPELINES = {
    "sd15": "StableDiffusionPipeline",
    "sd15-inpaint": "StableDiffusionInpaintPipeline",
    "sd21": "StableDiffusionPipeline",
    "sd21-inpaint": "StableDiffusionInpaintPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-inpaint": "StableDiffusionXLInpaintPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    "flux-all-in-one": "FluxPipeline",
}
_FLUX_PIPELINES = {384: "FluxFillPipeline", 128: "FluxControlPipeline"}
# Scaling and shift of latents, by the family whose VAE it is.
VAE_FACTORS = {
    **{"sd15": (0.18215, 0.0), "sd21": (0.18215, 0.0), "sdxl": (0.13025, 0.0)},
    **{"flux": (0.3611, 0.1159), "sd3": (1.5305, 0.0609)},
}
_PLAYGROUND_SCALING = 0.5
_SIDES = {"sd15": 64, "sd21": 64, "sdxl": 128}


def component_config(
    family: Family, part: str, widths: Mapping[str, int], *, prediction: Prediction | None = None, vae_of: str = ""
) -> dict[str, Any]:
    """The config.json of one part.

    Args:
        prediction: what the model predicts, as far as a VAE's latents follow from it.
        vae_of: of a VAE alone, the family it belongs to, one of VAE_FACTORS.
    """
    base = family.key.split("-")[0]
    if part == "unet":
        return _unet(family.key, base, widths)
    if part == "vae":
        return _vae(vae_of or base, widths, prediction)
    if part == "transformer":
        return _transformer(widths)
    if family.key == "t5" or ("th" in widths and part == "text_encoder_2"):
        return _t5(widths, "" if family.key == "t5" else "t")
    return _clip(family.key, part, widths)


def guessed_heads(family: Family, widths: Mapping[str, int]) -> bool:
    """Whether these are not the widths of a published model, so that the number of attention heads is a guess."""
    published = {"u0": (320, 384), "h": (768, 1024), "gh": (1280,), "d": (3072,)}
    return any(widths.get(symbol, sizes[0]) not in sizes for symbol, sizes in published.items())


def _unet(key: str, base: str, widths: Mapping[str, int]) -> dict[str, Any]:
    levels = sum(symbol[0] == "u" and symbol[1:].isdigit() for symbol in widths)
    channels = [widths[f"u{level}"] for level in range(levels)]
    depths = {"sdxl": [0, 2, 10], "sdxl-inpaint": [0, 2, 10], "sdxl-refiner": [0, 4, 4, 0]}.get(key, [1, 1, 1, 0])
    heads = 8 if base == "sd15" else [max(1, width // 64) for width in channels]
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": heads,
        "block_out_channels": channels,
        "center_input_sample": False,
        "cross_attention_dim": widths["x"],
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 9 if key.endswith("-inpaint") else 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": _SIDES[base],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "use_linear_projection": base != "sd15",
    }
    if base == "sd21":
        config["upcast_attention"] = True  # 2.1 overflows in fp16 without, and draws black; 2.0 loses nothing by it
    if "adm" in widths:
        refiner = key == "sdxl-refiner"
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": widths["adm"],
            "transformer_layers_per_block": 4 if refiner else [max(1, depth) for depth in depths],
        }
    return config


def _vae(base: str, widths: Mapping[str, int], prediction: Prediction | None) -> dict[str, Any]:
    scaling, shift = VAE_FACTORS.get(base, VAE_FACTORS["sd15"])
    wide = base in ("flux", "sd3")
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [widths[f"v{level}"] for level in range(4)],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 16 if wide else 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 1024 if wide or base == "sdxl" else 512,
        "scaling_factor": scaling,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    if wide:
        config |= {"shift_factor": shift, "use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": True}
    if base == "sdxl":
        config["force_upcast"] = True
    edm = prediction.edm if prediction is not None else None
    if edm is not None and edm.mean:
        config |= {"scaling_factor": _PLAYGROUND_SCALING, "latents_mean": list(edm.mean), "latents_std": list(edm.std)}
    return config


def _clip(key: str, part: str, widths: Mapping[str, int]) -> dict[str, Any]:
    letter = "g" if "gh" in widths and part == "text_encoder_2" else ""
    width = widths[f"{letter}h"]
    second = part == "text_encoder_2"
    layers = 32 if second else 23 if key.startswith("sd21") or key == "clip-h" else 12
    quick = layers == 12
    vocab = widths[f"{letter}vocab"]
    config: dict[str, Any] = {
        "architectures": ["CLIPTextModelWithProjection" if second else "CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": vocab - 2,
        "dropout": 0.0,
        "eos_token_id": vocab - 1,
        "hidden_act": "quick_gelu" if quick else "gelu",
        "hidden_size": width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": widths[f"{letter}m"],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": widths[f"{letter}positions"],
        "model_type": "clip_text_model",
        "num_attention_heads": max(1, width // 64),
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "projection_dim": width,
        "vocab_size": vocab,
    }
    return config


def _t5(widths: Mapping[str, int], letter: str) -> dict[str, Any]:
    heads = widths[f"{letter}heads"]
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": widths[f"{letter}m"],
        "d_kv": widths[f"{letter}i"] // heads,
        "d_model": widths[f"{letter}h"],
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_decoder_layers": 24,
        "num_heads": heads,
        "num_layers": 24,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": widths[f"{letter}b"],
        "tie_word_embeddings": False,
        "vocab_size": widths[f"{letter}vocab"],
    }


def _transformer(widths: Mapping[str, int]) -> dict[str, Any]:
    head = widths["hd"]
    # Rotary positions of row, column and picture: 16, 56 and 56 of 128.
    first = max(2, head // 8 // 2 * 2)
    rest = (head - first) // 2
    return {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": head,
        "axes_dims_rope": [first, rest, rest],
        "guidance_embeds": bool(widths["guided"]),
        "in_channels": widths["ins"],
        "joint_attention_dim": widths["c"],
        "num_attention_heads": widths["d"] // head,
        "num_layers": 19,
        "num_single_layers": 38,
        "out_channels": None if widths["ins"] == widths["outs"] else widths["outs"],
        "patch_size": 1,
        "pooled_projection_dim": widths["p"],
    }


def scheduler_config(family: Family, prediction: Prediction, *, guided: bool = True) -> dict[str, Any]:
    """scheduler/scheduler_config.json; `guided` tells Flux.1 dev from schnell, whose few steps are not shifted."""
    if family.key.startswith("flux"):
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "base_image_seq_len": 256,
            "base_shift": 0.5,
            "max_image_seq_len": 4096,
            "max_shift": 1.15,
            "num_train_timesteps": 1000,
            "shift": 3.0 if guided else 1.0,
            "use_dynamic_shifting": guided,
        }
    if prediction.edm is not None:
        return _edm(prediction)
    if prediction.kind == "flow":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    common = {
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "rescale_betas_zero_snr": prediction.zero_terminal_snr,
        "steps_offset": 1,
        "trained_betas": None,
    }
    # What such a file does not say, its folder does not say: who trains it is asked, and Diffusers takes epsilon.
    if prediction.kind is not None or family.key not in PREDICT_EITHER:
        common["prediction_type"] = prediction.kind or "epsilon"
    if family.key.startswith("sdxl"):
        spacing = "trailing" if prediction.zero_terminal_snr else "leading"
        return {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": spacing, **common}
    return {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False, **common}


def _edm(prediction: Prediction) -> dict[str, Any]:
    """As Playground v2.5 and CosXL were published, or as their documentation sets them up."""
    edm = prediction.edm
    assert edm is not None
    common = {
        "num_train_timesteps": 1000,
        "rho": 7.0,
        "sigma_data": edm.sigma_data,
        "sigma_max": edm.sigma_max,
        "sigma_min": edm.sigma_min,
    }
    if prediction.kind == "edm_v_prediction":
        return {
            "_class_name": "EDMEulerScheduler",
            "prediction_type": "v_prediction",
            "sigma_schedule": "exponential",
            **common,
        }
    return {
        "_class_name": "EDMDPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "dynamic_thresholding_ratio": 0.995,
        "euler_at_final": False,
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "solver_order": 2,
        "solver_type": "midpoint",
        "thresholding": False,
        **common,
    }


def model_index(
    family: Family, tokenizers: Mapping[str, str], *, scheduler: str = "", channels: int = 0
) -> dict[str, Any]:
    """model_index.json; a tokenizer that the folder lacks stands there as nothing.

    Args:
        tokenizers: the ones that are there, with their class, such as {"tokenizer": "CLIPTokenizer"}.
        scheduler: the scheduler's class; the family's own where it is left out.
        channels: what a Flux.1 transformer takes in, which tells its task.
    """
    classes = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel" if "flux" in family.key else "CLIPTextModelWithProjection"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    nothing: list[None] = [None, None]
    index: dict[str, Any] = {"_class_name": _FLUX_PIPELINES.get(channels, _PIPELINES[family.key])}
    for part in family.parts:
        index[part] = classes[part]
    for part in ("text_encoder", "text_encoder_2"):
        if part in family.parts:
            name = part.replace("text_encoder", "tokenizer")
            index[name] = ["transformers", tokenizers[name]] if name in tokenizers else nothing
    scheduler = scheduler or scheduler_config(family, Prediction(None, ""))["_class_name"]
    index["scheduler"] = ["diffusers", scheduler]
    if family.key == "sdxl-refiner":
        index |= {"text_encoder": nothing, "tokenizer": nothing}
    if family.key.startswith("sdxl"):
        index["force_zeros_for_empty_prompt"] = family.key == "sdxl"
        if family.key == "sdxl-refiner":
            index["requires_aesthetics_score"] = True
    elif family.key.startswith(("sd15", "sd21")):
        index |= {"feature_extractor": nothing, "safety_checker": nothing, "requires_safety_checker": False}
    return dict(sorted(index.items()))
