"""Load exports of SD 2.x, SDXL and Flux strictly into the original implementations and compare outputs with diffusers'.

The originals are not part of this project; give the folder that holds checkouts named stablediffusion,
generative-models and flux. They need `einops`, OpenCLIP's towers need `open_clip_torch`; packages that these import
without using them here are replaced by empty stand-ins. SD 1.5 has a script of its own, parity_ldm.py.

    python scripts/parity_originals.py EXPORT.safetensors DIFFUSERS_FOLDER --family sdxl --originals FOLDER

All comparisons are fp32. For Flux, ae.safetensors lies beside the export.
"""

import argparse
import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TOLERANCE = 1e-5  # of the largest value of the output
UNET = "model.diffusion_model."


def main() -> int:
    """Run every comparison of one family; 0 when all agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the exported .safetensors, fp32")
    parser.add_argument("folder", type=Path, help="the Diffusers folder it was made from")
    parser.add_argument("--family", choices=sorted(COMPARISONS), required=True)
    parser.add_argument("--originals", type=Path, required=True, help="folder with checkouts of the originals")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs")
    options = parser.parse_args()

    import torch
    from safetensors.torch import load_file

    stored = load_file(options.checkpoint)
    others = {str(tensor.dtype) for tensor in stored.values()} - {"torch.float32"}
    if others:
        parser.error(f"{options.checkpoint} holds {', '.join(sorted(others))}: export it as fp32")
    figures = []
    used: set[str] = set()
    for compare in COMPARISONS[options.family]:
        torch.manual_seed(options.seed)
        with torch.no_grad():
            figures += compare(stored, options, used)
    left = sorted(stored.keys() - used)
    if options.family != "flux":
        left = [name for name in left if not name.startswith("first_stage_model.")]  # parity_ldm.py has the same class
    for figure in figures:
        figure["ok"] = figure["relative"] <= TOLERANCE
        print(f"{'ok' if figure['ok'] else 'FAILED':6} {figure['output']:28} {figure['keys']:4} keys  "
              f"largest {figure['largest']:.4g}  relative {figure['relative']:.3g}")  # fmt: skip
    agree = all(figure["ok"] for figure in figures) and not left
    print(json.dumps({"agree": agree, "tolerance": TOLERANCE, "not_loaded": left[:5], "figures": figures}))
    return 0 if agree else 1


# ------------------------------------------------------------------------------------------------ the originals


def package(name: str, path: Path) -> None:
    """Make a package importable without running its __init__, which imports what training needs."""
    if not path.is_dir():
        raise SystemExit(f"There is no {path}: check out the original there.")
    module = types.ModuleType(name)
    module.__path__ = [str(path)]
    sys.modules[name] = module


def stand_in(name: str, **values: Any) -> None:
    """An empty module, for an import that is not used here."""
    if name not in sys.modules:
        module = types.ModuleType(name)
        module.__dict__.update(values)
        sys.modules[name] = module


def load_strictly(model: Any, stored: Mapping[str, Any], prefix: str, used: set[str]) -> int:
    """Load what is below a prefix; a missing or superfluous name ends the script."""
    tensors = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    different = sorted(model.state_dict().keys() ^ tensors.keys())
    if different:
        raise SystemExit(f"FAILED: {type(model).__name__} and the file differ in {len(different)}: {different[:5]}")
    model.load_state_dict(tensors, strict=True)
    model.eval()
    used |= {prefix + name for name in tensors}
    return len(tensors)


def measured(output: str, keys: int, theirs: Any, ours: Any) -> dict[str, Any]:
    """How far an output of the original is from diffusers' or transformers'."""
    if theirs.shape != ours.shape:
        raise SystemExit(f"FAILED: {output} is {list(theirs.shape)} in the original, {list(ours.shape)} in diffusers")
    largest, difference = ours.abs().max().item(), (theirs - ours).abs().max().item()
    relative = difference / largest if largest > 0 else float("inf")
    return {"output": output, "keys": keys, "largest": largest, "difference": difference, "relative": relative}


def compare_sd21_unet(stored: Mapping[str, Any], options: Any, used: set[str]) -> list[dict[str, Any]]:
    """The noise predicted by Stability-AI/stablediffusion's U-Net."""
    import torch
    from diffusers import UNet2DConditionModel

    root = options.originals / "stablediffusion" / "ldm"
    for name in ("ldm", "ldm.modules", "ldm.modules.diffusionmodules"):
        package(name, root.parent / name.replace(".", "/"))
    original_class = importlib.import_module("ldm.modules.diffusionmodules.openaimodel").UNetModel
    unet = UNet2DConditionModel.from_pretrained(options.folder / "unet").eval()
    widths = list(unet.config.block_out_channels)
    original = original_class(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=widths[0],
        attention_resolutions=[4, 2, 1],
        num_res_blocks=2,
        channel_mult=[width // widths[0] for width in widths],
        num_head_channels=widths[0] // unet.config.attention_head_dim[0],
        use_spatial_transformer=True,
        use_linear_in_transformer=True,
        transformer_depth=1,
        context_dim=unet.config.cross_attention_dim,
        use_checkpoint=False,
        legacy=False,
    )
    keys = load_strictly(original, stored, UNET, used)
    latents, text = torch.randn(2, 4, 32, 32), torch.randn(2, 77, unet.config.cross_attention_dim)
    steps = torch.tensor([1, 981])
    theirs, ours = original(latents, steps, context=text), unet(latents, steps, encoder_hidden_states=text).sample
    return [measured("SD 2.x U-Net", keys, theirs, ours)]


def compare_sdxl_unet(stored: Mapping[str, Any], options: Any, used: set[str]) -> list[dict[str, Any]]:
    """The noise predicted by Stability-AI/generative-models' U-Net, of the base model or the refiner."""
    import torch
    from diffusers import UNet2DConditionModel

    root = options.originals / "generative-models"
    for name in ("sgm", "sgm.modules", "sgm.modules.diffusionmodules"):
        package(name, root / name.replace(".", "/"))
    stand_in("sgm.modules.video_attention", SpatialVideoTransformer=type("Unused", (), {}))
    original_class = importlib.import_module("sgm.modules.diffusionmodules.openaimodel").UNetModel
    unet = UNet2DConditionModel.from_pretrained(options.folder / "unet").eval()
    widths = list(unet.config.block_out_channels)
    refiner = options.family == "sdxl-refiner"
    original = original_class(
        in_channels=4,
        out_channels=4,
        model_channels=widths[0],
        attention_resolutions=[4, 2],
        num_res_blocks=2,
        channel_mult=[width // widths[0] for width in widths],
        num_head_channels=widths[0] // unet.config.attention_head_dim[0],
        num_classes="sequential",
        adm_in_channels=unet.config.projection_class_embeddings_input_dim,
        transformer_depth=4 if refiner else [1, 2, 10],  # as in sd_xl_refiner.yaml and sd_xl_base.yaml
        context_dim=unet.config.cross_attention_dim,
        use_linear_in_transformer=True,
        spatial_transformer_attn_type="softmax",
        use_checkpoint=False,
    )
    keys = load_strictly(original, stored, UNET, used)
    latents, text = torch.randn(2, 4, 32, 32), torch.randn(2, 77, unet.config.cross_attention_dim)
    sizes = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024], [512, 768, 16, 0, 1024, 1024]])
    if refiner:
        sizes = torch.tensor([[1024.0, 1024, 0, 0, 6], [512, 768, 16, 0, 2.5]])  # the last one is the aesthetic score
    pooled = torch.randn(2, unet.config.projection_class_embeddings_input_dim - sizes.shape[1] * 256)
    embedded = unet.add_time_proj(sizes.flatten()).reshape(2, -1)
    steps = torch.tensor([1, 981])
    theirs = original(latents, steps, context=text, y=torch.cat([pooled, embedded], dim=1))
    ours = unet(
        latents,
        steps,
        encoder_hidden_states=text,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
    ).sample
    return [measured("SDXL refiner U-Net" if refiner else "SDXL U-Net", keys, theirs, ours)]


def compare_open_clip(part: str, prefix: str) -> Callable[..., list[dict[str, Any]]]:
    """OpenCLIP's text tower: every token's output, and the pooled one where there is a projection."""

    def compare(stored: Mapping[str, Any], options: Any, used: set[str]) -> list[dict[str, Any]]:
        import torch
        import transformers

        stand_in("torchvision")
        stand_in("torchvision.ops")
        stand_in("torchvision.ops.misc", FrozenBatchNorm2d=None)
        spec = importlib.util.find_spec("open_clip")
        if spec is None:
            raise SystemExit("OpenCLIP is not installed: pip install --no-deps open_clip_torch")
        package("open_clip", Path(next(iter(spec.submodule_search_locations))))
        tower_class = importlib.import_module("open_clip.transformer").TextTransformer
        pooled = f"{prefix}text_projection" in stored
        kind = transformers.CLIPTextModelWithProjection if pooled else transformers.CLIPTextModel
        encoder = kind.from_pretrained(options.folder / part).eval()
        config = encoder.config
        original = tower_class(
            context_length=77,
            vocab_size=config.vocab_size,
            width=config.hidden_size,
            heads=config.num_attention_heads,
            layers=config.num_hidden_layers,
            output_dim=config.hidden_size,
            proj_type="linear" if pooled else "none",
            output_tokens=True,
        )
        keys = load_strictly(original, stored, prefix, used)
        tokens = torch.randint(0, config.vocab_size - 2, (2, 77))
        tokens[0, 20:], tokens[1, 76] = config.eos_token_id, config.eos_token_id
        theirs_pooled, theirs = original(tokens)
        ours = encoder(tokens)
        last = ours.last_hidden_state
        figures = [measured(f"OpenCLIP {part}", keys, theirs, last)]
        if pooled:
            figures.append(measured(f"OpenCLIP {part}, pooled", keys, theirs_pooled, ours.text_embeds))
        return figures

    return compare


def compare_clip_l(stored: Mapping[str, Any], options: Any, used: set[str]) -> list[dict[str, Any]]:
    """SDXL's first text encoder is Hugging Face's own CLIP in the original too: names strictly, and its output."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    prefix = "conditioner.embedders.0.transformer.text_model."
    encoder = CLIPTextModel.from_pretrained(options.folder / "text_encoder").eval()
    original = CLIPTextModel(CLIPTextConfig.from_pretrained(options.folder / "text_encoder"))
    original = getattr(original, "text_model", original)  # transformers before 5.6 nests it
    keys = load_strictly(original, stored, prefix, used)
    tokens = torch.randint(0, encoder.config.vocab_size, (2, 77))
    return [measured("CLIP-L", keys, original(tokens).last_hidden_state, encoder(tokens).last_hidden_state)]


def compare_flux(stored: Mapping[str, Any], options: Any, used: set[str]) -> list[dict[str, Any]]:
    """The velocity predicted by black-forest-labs/flux' transformer."""
    import torch
    from diffusers import FluxTransformer2DModel

    root = options.originals / "flux" / "src" / "flux"
    for name in ("flux", "flux.modules"):
        package(name, root.parent / name.replace(".", "/"))
    module = importlib.import_module("flux.model")
    transformer = FluxTransformer2DModel.from_pretrained(options.folder / "transformer").eval()
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    original = module.Flux(
        module.FluxParams(
            in_channels=config.in_channels,
            out_channels=config.in_channels,
            vec_in_dim=config.pooled_projection_dim,
            context_in_dim=config.joint_attention_dim,
            hidden_size=width,
            mlp_ratio=4.0,
            num_heads=config.num_attention_heads,
            depth=config.num_layers,
            depth_single_blocks=config.num_single_layers,
            axes_dim=list(config.axes_dims_rope),
            theta=10_000,
            qkv_bias=True,
            guidance_embed=config.guidance_embeds,
        )
    )
    keys = load_strictly(original, stored, "", used)
    side = 4
    picture, text = torch.randn(1, side * side, config.in_channels), torch.randn(1, 12, config.joint_attention_dim)
    pooled, time, guidance = torch.randn(1, config.pooled_projection_dim), torch.tensor([0.7]), torch.tensor([3.5])
    places = torch.zeros(side * side, 3)
    places[:, 1] = torch.arange(side * side) // side
    places[:, 2] = torch.arange(side * side) % side
    nowhere = torch.zeros(12, 3)
    theirs = original(picture, places[None], text, nowhere[None], time, pooled, guidance)
    ours = transformer(
        hidden_states=picture,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=time,
        img_ids=places,
        txt_ids=nowhere,
        guidance=guidance,
    ).sample
    return [measured("Flux transformer", keys, theirs, ours)]


def compare_flux_vae(stored: Mapping[str, Any], options: Any, used: set[str]) -> list[dict[str, Any]]:
    """Moments and decoded latents of black-forest-labs/flux' autoencoder."""
    import torch
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file

    module = importlib.import_module("flux.modules.autoencoder")
    vae = AutoencoderKL.from_pretrained(options.folder / "vae").eval()
    widths = list(vae.config.block_out_channels)
    original = module.AutoEncoder(
        module.AutoEncoderParams(
            resolution=256,
            in_channels=3,
            ch=widths[0],
            out_ch=3,
            ch_mult=[width // widths[0] for width in widths],
            num_res_blocks=2,
            z_channels=16,
            scale_factor=vae.config.scaling_factor,
            shift_factor=vae.config.shift_factor,
        )
    )
    beside = load_file(options.checkpoint.with_name("ae.safetensors"))
    keys = load_strictly(original, beside, "", set())
    picture, latents = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 16, 8, 8)
    moments = vae.encode(picture).latent_dist.parameters
    return [
        measured("Flux VAE encoder (moments)", keys, original.encoder(picture), moments),
        measured("Flux VAE decoder", keys, original.decoder(latents), vae.decode(latents).sample),
    ]


COMPARISONS: dict[str, tuple[Callable[..., list[dict[str, Any]]], ...]] = {
    "sd21": (compare_sd21_unet, compare_open_clip("text_encoder", "cond_stage_model.model.")),
    "sdxl": (
        compare_sdxl_unet,
        compare_clip_l,
        compare_open_clip("text_encoder_2", "conditioner.embedders.1.model."),
    ),
    "sdxl-refiner": (compare_sdxl_unet, compare_open_clip("text_encoder_2", "conditioner.embedders.0.model.")),
    "flux": (compare_flux, compare_flux_vae),
}


if __name__ == "__main__":
    sys.exit(main())
