"""Real model classes of every family at the widths of the recorded tiny lists, with random weights, as folders.

The widths change where those of the published models change, so that every tensor of the original has its counterpart.
Weights are random in every tensor, also where a fresh model has ones and zeros: two swapped tensors must differ.
"""

import gzip
import json
from pathlib import Path

DATA = Path(__file__).parent / "data"
FAMILIES = ("sd15", "sd15-inpaint", "sd21", "sdxl", "sdxl-refiner", "flux")
VOCAB = 49408
_SD_VAE = {"block_out_channels": (32, 64, 128, 128), "latent_channels": 4}
_PIPELINES = {
    "sd15": "StableDiffusionPipeline",
    "sd15-inpaint": "StableDiffusionInpaintPipeline",
    "sd21": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    "flux": "FluxPipeline",
}
WIDTHS = {
    "tiny": {"unet": (32, 64, 128, 128), "vae": (32, 64, 128, 128), "h": 32, "H": 64, "G": 64, "heads": 4},
    "full": {"unet": (320, 640, 1280, 1280), "vae": (128, 256, 512, 512), "h": 768, "H": 1024, "G": 1280, "heads": 64},
}


def reference(name):
    """A recorded list of the original file: (required names -> shapes, all names -> shapes)."""
    recorded = json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))
    everything = {key: tuple(shape) for key, shape in recorded["tensors"].items()}
    return {key: shape for key, shape in everything.items() if recorded["class"][key] == "required"}, everything


def build_parts(family, size="tiny", *, guidance=True):
    """The real classes of a family."""
    import diffusers
    import transformers

    widths = WIDTHS[size]
    first, last = widths["unet"][0], size == "tiny"
    heads = 4 if last else None

    def clip(width, layers, kind=transformers.CLIPTextModel, act="quick_gelu"):
        return kind(
            transformers.CLIPTextConfig(
                vocab_size=VOCAB,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=max(1, width // widths["heads"] if not last else 4),
                hidden_act=act,
                projection_dim=width,
                bos_token_id=VOCAB - 2,
                eos_token_id=VOCAB - 1,
            )
        )

    def unet(**settings):
        return diffusers.UNet2DConditionModel(sample_size=8, norm_num_groups=32, **settings)

    def vae(latents=4, **settings):
        return diffusers.AutoencoderKL(
            block_out_channels=widths["vae"],
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=latents,
            **settings,
        )

    if family in ("sd15", "sd15-inpaint"):
        channels = 9 if family == "sd15-inpaint" else 4
        denoiser = unet(
            block_out_channels=widths["unet"],
            cross_attention_dim=widths["h"],
            attention_head_dim=heads or 8,
            in_channels=channels,
        )
        return {"unet": denoiser, "vae": vae(), "text_encoder": clip(widths["h"], 12)}
    if family == "sd21":
        denoiser = unet(
            block_out_channels=widths["unet"],
            cross_attention_dim=widths["H"],
            attention_head_dim=[max(1, width // 16 if last else width // 64) for width in widths["unet"]],
            use_linear_projection=True,
        )
        return {"unet": denoiser, "vae": vae(), "text_encoder": clip(widths["H"], 23, act="gelu")}
    projected = transformers.CLIPTextModelWithProjection
    if family == "sdxl":
        denoiser = unet(
            block_out_channels=widths["unet"][:3],
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            cross_attention_dim=widths["h"] + widths["G"],
            attention_head_dim=[max(1, width // 16 if last else width // 64) for width in widths["unet"][:3]],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=widths["G"] + 6 * 256,
        )
        return {
            "unet": denoiser,
            "vae": vae(),
            "text_encoder": clip(widths["h"], 12),
            "text_encoder_2": clip(widths["G"], 32, projected, "gelu"),
        }
    if family == "sdxl-refiner":
        levels = (first, 2 * first, 4 * first, 4 * first) if last else (384, 768, 1536, 1536)
        denoiser = unet(
            block_out_channels=levels,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=4,
            cross_attention_dim=widths["G"],
            attention_head_dim=[width // 16 if last else width // 64 for width in levels],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=widths["G"] + 5 * 256,
        )
        return {"unet": denoiser, "vae": vae(), "text_encoder_2": clip(widths["G"], 32, projected, "gelu")}
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=16 if last else 128,
        num_attention_heads=4 if last else 24,
        joint_attention_dim=48 if last else 4096,
        pooled_projection_dim=widths["h"],
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6) if last else (16, 56, 56),
    )
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=VOCAB if last else 32128,
            d_model=48 if last else 4096,
            d_kv=8 if last else 64,
            d_ff=96 if last else 10240,
            num_layers=24,
            num_heads=4 if last else 64,
            feed_forward_proj="gated-gelu",
        )
    )
    return {
        "transformer": transformer,
        "vae": vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611),
        "text_encoder": clip(widths["h"], 12),
        "text_encoder_2": t5,
    }


def fill(parts, seed):
    """Give every tensor of the models, which were made without memory, random values."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for model in parts.values():
            model.to_empty(device="cpu")
            for name, tensor in model.named_parameters():
                noise = torch.randn(tensor.shape, generator=generator)
                # Norms stay near one: smaller, and what a block computes would hardly reach the output.
                tensor.copy_(1 + 0.2 * noise if tensor.dim() == 1 and name.endswith("weight") else 0.05 * noise)
    return parts


def write_index(folder, family, parts, **scheduler):
    """model_index.json and the scheduler: what makes saved parts a pipeline; without tokenizers."""
    index = {"_class_name": _PIPELINES[family], "_diffusers_version": "0.34.0"}
    for part, model in parts.items():
        kind = type(model)
        index[part] = [kind.__module__.split(".")[0], kind.__name__]
    for name in ("text_encoder", "text_encoder_2"):
        index.setdefault(name, [None, None]) if family.startswith("sdxl") else None
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler").mkdir(exist_ok=True)
    settings = {"_class_name": "DDIMScheduler", "prediction_type": "epsilon", **scheduler}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))


def make_folder(folder, family, *, seed=1, scheduler=None, **build):
    """Save a tiny model of a family; returns part -> state dict."""
    import torch

    with torch.device("meta"):
        parts = build_parts(family, **build)
    fill(parts, seed)
    for part, model in parts.items():
        model.save_pretrained(folder / part)
    write_index(folder, family, parts, **(scheduler or {}))
    return {part: model.state_dict() for part, model in parts.items()}
