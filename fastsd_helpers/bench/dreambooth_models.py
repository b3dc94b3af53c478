"""Models to time: the embedded one, or a family's networks at some part of their widths with random weights."""

from pathlib import Path
from typing import Any

__all__ = ["make_model"]

# Divisors of the published widths. At a quarter and 256 px the VAE's encoder does 0.455 of the multiplications of SD
# 1.5's U-Net step (forward and backward), near the 0.463 of the whole model at 512 px. That is work, not time: on a CPU
# the narrow U-Net spends much of its time in norms and copies, so caching gains less there than at full width.
_DIVISORS = {"sixteenth": 16, "quarter": 4, "sd15": 1, "sdxl": 1}


def make_model(family: str, name: str, folder: Path) -> Path:
    """The embedded model, or a new folder with a family's networks at some part of their widths and random weights."""
    from fastsd_helpers.demo import MODEL_FOLDER

    if name == "demo":
        return MODEL_FOLDER
    import torch

    torch.manual_seed(0)
    part = _DIVISORS[name]
    (_make_sdxl if family == "sdxl" else _make_sd15)(part).save_pretrained(folder)
    return folder


def _groups(part: int) -> int:
    return min(32, 64 // part)


def _shared(part: int, scaling_factor: float) -> dict[str, Any]:
    """VAE, tokenizer and scheduler, which both families have alike."""
    import diffusers
    from transformers import CLIPTokenizer

    from fastsd_helpers.demo import MODEL_FOLDER

    return {
        "vae": diffusers.AutoencoderKL(
            block_out_channels=tuple(channels // part for channels in (128, 256, 512, 512)),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=_groups(part),
            scaling_factor=scaling_factor,
        ),
        "tokenizer": CLIPTokenizer.from_pretrained(MODEL_FOLDER / "tokenizer", local_files_only=True),
        "scheduler": diffusers.DDIMScheduler.from_pretrained(MODEL_FOLDER / "scheduler", local_files_only=True),
    }


def _text_settings(tokenizer: Any, part: int, width: int, heads: int, layers: int) -> Any:
    from transformers import CLIPTextConfig

    vocabulary = len(tokenizer)
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width // part,
        intermediate_size=4 * width // part,
        projection_dim=width // part,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )


def _make_sd15(part: int) -> Any:
    import diffusers
    from transformers import CLIPTextModel

    shared = _shared(part, 0.18215)
    return diffusers.StableDiffusionPipeline(
        **shared,
        text_encoder=CLIPTextModel(_text_settings(shared["tokenizer"], part, 768, 12 // part, 12)),
        unet=diffusers.UNet2DConditionModel(
            sample_size=64 if part == 1 else 32,
            block_out_channels=tuple(channels // part for channels in (320, 640, 1280, 1280)),
            cross_attention_dim=768 // part,
            attention_head_dim=8 // part,  # so diffusers calls the number of heads; each is as wide as the original's
            norm_num_groups=_groups(part),
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _make_sdxl(part: int) -> Any:
    """Heads are as many as in the original, each as much narrower: 64 is no multiple of what is left of 320."""
    import copy

    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    shared = _shared(part, 0.13025)
    large = _text_settings(shared["tokenizer"], part, 1280, 20, 32)
    large.hidden_act = "gelu"
    return diffusers.StableDiffusionXLPipeline(
        **shared,
        text_encoder=CLIPTextModel(_text_settings(shared["tokenizer"], part, 768, 12, 12)),
        text_encoder_2=CLIPTextModelWithProjection(large),
        tokenizer_2=copy.deepcopy(shared["tokenizer"]),
        unet=diffusers.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=tuple(channels // part for channels in (320, 640, 1280)),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            cross_attention_dim=2048 // part,
            attention_head_dim=[5, 10, 20],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256 // part,
            projection_class_embeddings_input_dim=(1280 + 6 * 256) // part,
            norm_num_groups=_groups(part),
        ),
    )
