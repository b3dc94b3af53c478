"""Load an SD 1.5 or inpainting export strictly into the original latent-diffusion code and compare with diffusers.

The original code is not part of this project; give the path of a checkout of CompVis/stable-diffusion or of
CompVis/latent-diffusion. It needs `einops`; packages that it imports without using them here are replaced by empty
stand-ins. Everything is compared twice: in fp32, as the models run, and with the same weights in fp64, where rounding
no longer hides a small mistake. The text encoder of SD 1.x is Hugging Face's own CLIP in the original too: its keys
are checked strictly, and its output is compared after loading from the file.

    python scripts/parity_ldm.py exports/model.safetensors path/to/diffusers-folder --ldm path/to/stable-diffusion
"""

import argparse
import json
import subprocess
import sys
import types
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

TOLERANCES = {"fp32": 1e-5, "fp64": 1e-9}  # of the largest value of the output
LATENT_SIDE = 32  # the lowest level then has 4 x 4 values: with 1 x 1, normalisation magnifies fp32's rounding
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."


def main() -> int:
    """Run every comparison; 0 when all agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the exported .safetensors, fp32")
    parser.add_argument("folder", type=Path, help="the Diffusers folder it was made from")
    parser.add_argument("--ldm", type=Path, required=True, help="a checkout of the original code")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs")
    options = parser.parse_args()
    if not (options.ldm / "ldm" / "modules").is_dir():
        parser.error(f"{options.ldm} holds no ldm/modules: give the top folder of the original code")
    sys.path.insert(0, str(options.ldm))
    replace_unused_imports()

    from safetensors.torch import load_file

    stored = load_file(options.checkpoint)
    others = {str(tensor.dtype) for tensor in stored.values()} - {"torch.float32"}
    if others:
        parser.error(f"{options.checkpoint} holds {', '.join(sorted(others))}: export it as fp32")
    stray = [name for name in stored if not name.startswith((UNET, VAE, TEXT))]
    if stray:
        print(f"FAILED: names under none of the original's prefixes: {stray[:3]}")
        return 1
    print(f"original code: {commit_of(options.ldm)}")
    print(f"file: {options.checkpoint.name}, {len(stored)} tensors; inputs of seed {options.seed}")
    figures = []
    for precision in TOLERANCES:
        for compare in (compare_unet, compare_vae, compare_text_encoder):
            for figure in compare(stored, options.folder, options.seed, precision):
                figures.append({"precision": precision, **figure})
    for figure in figures:
        figure["ok"] = figure["relative"] <= TOLERANCES[figure["precision"]]
        verdict = "ok" if figure["ok"] else "FAILED"
        print(
            f"{verdict:6} {figure['precision']} {figure['output']:22} {figure['keys']:4} keys  "
            f"largest {figure['largest']:.4g}  difference {figure['difference']:.3g}  relative {figure['relative']:.3g}"
        )
    agree = all(figure["ok"] for figure in figures)
    print(json.dumps({"agree": agree, "tolerances": TOLERANCES, "figures": figures}))
    return 0 if agree else 1


def replace_unused_imports() -> None:
    """Stand in for packages that the original imports for training only."""
    from torch import nn

    contents: dict[str, dict[str, Any]] = {
        "pytorch_lightning": {"LightningModule": nn.Module},
        "omegaconf": {},
        "omegaconf.listconfig": {"ListConfig": type("ListConfig", (), {})},
        "taming": {},
        "taming.modules": {},
        "taming.modules.vqvae": {},
        "taming.modules.vqvae.quantize": {"VectorQuantizer2": None},
    }
    for name, values in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update(values)
        sys.modules[name] = module


def commit_of(checkout: Path) -> str:
    """The commit of the original code, for the record."""
    found = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or f"{checkout} (no git checkout)"


def under(stored: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors below one prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}


def load_strictly(model: Any, tensors: dict[str, Any]) -> int:
    """Load with exactly equal sets of names; a missing or a superfluous one ends the script."""
    different = sorted(model.state_dict().keys() ^ tensors.keys())
    if different:
        raise SystemExit(f"FAILED: {type(model).__name__} and the file differ in {len(different)}: {different[:5]}")
    model.load_state_dict(tensors, strict=True)
    model.eval()
    return len(tensors)


class Multiple(Fraction):
    """A factor of the first width, as the original's configuration has them; times a width it is an integer."""

    def __mul__(self, width: int) -> int:
        product = Fraction(self) * width
        if product.denominator != 1:
            raise ValueError(f"{width} times {self} is no width")
        return int(product)

    __rmul__ = __mul__


def multiples(widths: list[int]) -> list[Multiple]:
    """Widths as the original's configuration has them; 96 beside 64 is allowed, although no original has it."""
    return [Multiple(width, widths[0]) for width in widths]


def measured(output: str, keys: int, theirs: Any, ours: Any) -> dict[str, Any]:
    """How far an output of the original is from diffusers'."""
    if theirs.shape != ours.shape:
        raise SystemExit(f"FAILED: {output} is {list(theirs.shape)} in the original, {list(ours.shape)} in diffusers")
    largest, difference = ours.abs().max().item(), (theirs - ours).abs().max().item()
    return {
        "output": output,
        "keys": keys,
        "largest": largest,
        "difference": difference,
        # Outputs that are not a number make this comparison fail too.
        "relative": difference / largest if largest > 0 else float("inf"),
    }


def widened(model: Any, precision: str) -> Any:
    """The model in fp64 where that is asked for; also where the original asks for fp32 on its own."""
    import torch
    from torch import nn

    if precision == "fp32":
        return model
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = types.MethodType(nn.GroupNorm.forward, module)
    if hasattr(model, "time_embed"):
        model.dtype = torch.float64
        model.time_embed.register_forward_pre_hook(lambda module, given: tuple(value.double() for value in given))
    return model.double()


def compare_unet(stored: Mapping[str, Any], folder: Path, seed: int, precision: str) -> list[dict[str, Any]]:
    """The noise predicted at three timesteps."""
    import torch
    from diffusers import UNet2DConditionModel
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    widths = list(unet.config.block_out_channels)
    original = UNetModel(
        image_size=32,
        in_channels=unet.config.in_channels,  # 9 for inpainting: latents, mask, latents of what is kept
        out_channels=4,
        model_channels=widths[0],
        attention_resolutions=[4, 2, 1],
        num_res_blocks=2,
        channel_mult=multiples(widths),
        num_heads=unet.config.attention_head_dim,  # the number of heads, in spite of its name
        use_spatial_transformer=True,
        transformer_depth=1,
        context_dim=unet.config.cross_attention_dim,
        use_checkpoint=False,
        legacy=False,
    )
    keys = load_strictly(original, under(stored, UNET))
    original, unet = widened(original, precision), widened(unet, precision)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(3, unet.config.in_channels, LATENT_SIDE, LATENT_SIDE, generator=generator).to(unet.dtype)
    text = torch.randn(3, 77, unet.config.cross_attention_dim, generator=generator).to(unet.dtype)
    timesteps = torch.tensor([1, 500, 981])
    with torch.no_grad():
        theirs = original(latents, timesteps, context=text)
        ours = unet(latents, timesteps, encoder_hidden_states=text).sample
    return [measured("U-Net", keys, theirs, ours)]


def compare_vae(stored: Mapping[str, Any], folder: Path, seed: int, precision: str) -> list[dict[str, Any]]:
    """Moments of two pictures, and two latents decoded."""
    import torch
    from diffusers import AutoencoderKL
    from ldm.models.autoencoder import AutoencoderKL as Original

    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    widths = list(vae.config.block_out_channels)
    original = Original(
        ddconfig={
            "double_z": True,
            "z_channels": 4,
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": widths[0],
            "ch_mult": multiples(widths),
            "num_res_blocks": 2,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        lossconfig={"target": "torch.nn.Identity"},
        embed_dim=4,
    )
    keys = load_strictly(original, under(stored, VAE))
    original, vae = widened(original, precision), widened(vae, precision)
    generator = torch.Generator().manual_seed(seed + 1)
    pictures = (torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1).to(vae.dtype)
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(vae.dtype)
    with torch.no_grad():
        moments = original.encode(pictures).parameters, vae.encode(pictures).latent_dist.parameters
        decoded = original.decode(latents), vae.decode(latents).sample
    return [measured("VAE encoder (moments)", keys, *moments), measured("VAE decoder", keys, *decoded)]


def compare_text_encoder(stored: Mapping[str, Any], folder: Path, seed: int, precision: str) -> list[dict[str, Any]]:
    """The last hidden state of two rows of tokens."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    original = CLIPTextModel(config)
    long = any(name.startswith("text_model.") for name in original.state_dict())  # transformers before 5.6
    tensors = under(stored, TEXT)
    keys = load_strictly(
        original, {f"text_model.{name}": value for name, value in tensors.items()} if long else tensors
    )
    original, encoder = widened(original, precision), widened(encoder, precision)
    generator = torch.Generator().manual_seed(seed + 2)
    tokens = torch.randint(0, config.vocab_size, (2, 77), generator=generator)
    with torch.no_grad():
        theirs, ours = original(tokens).last_hidden_state, encoder(tokens).last_hidden_state
    return [measured("text encoder", keys, theirs, ours)]


if __name__ == "__main__":
    sys.exit(main())
