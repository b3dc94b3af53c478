"""The plain loop of SDXL: a LoRA of the U-Net's attention, as diffusers' script trains it."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.bench.dreambooth_loops import LR, PROMPT, RANK, Step, pixels_of
from fastsd_helpers.device import describe_device
from fastsd_helpers.inert import require_inert
from fastsd_helpers.runtime import load_peft

if TYPE_CHECKING:
    import torch

    from fastsd_helpers.bench.clock import Clock
    from fastsd_helpers.bench.dreambooth_settings import Settings

__all__ = ["open_plain"]


def open_plain(
    settings: "Settings", model: Path, pictures: list[Path], clock: "Clock", *, keep_latents: bool = False
) -> tuple[Step, float]:
    """Written from the published script's order of events with diffusers' own classes; nothing of ours is in it.

    Args:
        keep_latents: the mean and deviation of every image's latents are computed before the first step and kept.
    """
    import torch
    from diffusers import DDPMScheduler

    require_inert(model)
    device = torch.device(describe_device().kind)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[settings.precision]
    half = dtype is not torch.float32
    prompt, pooled = _encode_prompt(model, device, dtype)
    vae, unet = _open_networks(model, device, dtype, settings)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    schedule = DDPMScheduler.from_pretrained(model, subfolder="scheduler", local_files_only=True)
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    side, rows = settings.resolution, settings.batch_size
    sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=dtype, device=device).repeat(rows, 1)
    told = {"time_ids": sizes, "text_embeds": pooled.repeat(rows, 1)}
    kept: list[Any] = []
    began = clock.now()
    if keep_latents:
        # Every step takes a run of images; as many steps as images name every run once.
        with torch.no_grad():
            kept = [vae.encode(_pixels(pictures, settings, index, device)) for index in range(len(pictures))]
    caches = clock.now() - began if keep_latents else 0.0

    def step(index: int) -> None:
        with clock.part("vae"):
            if kept:
                latents = kept[index % len(kept)].latent_dist.sample()
            else:
                latents = vae.encode(_pixels(pictures, settings, index, device)).latent_dist.sample()
            latents = (latents * vae.config.scaling_factor).to(dtype)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, schedule.config.num_train_timesteps, (rows,), device=device)
        with torch.autocast(device.type, dtype) if half else contextlib.nullcontext():
            noisy = schedule.add_noise(latents, noise, timesteps)
            predicted = unet(noisy, timesteps, prompt.repeat(rows, 1, 1), added_cond_kwargs=told).sample
            loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        with clock.part("optimizer"):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss.item()  # the script shows it in its bar

    return step, caches


def _open_networks(model: Path, device: Any, dtype: Any, settings: "Settings") -> tuple[Any, Any]:
    """The frozen VAE, and the frozen U-Net with its LoRA in fp32."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    peft = load_peft("The plain loop of SDXL", "Run: fastsd install dreambooth.")
    # The script has the VAE in fp32 whatever the precision (in fp16 SDXL's overflows), and casts what comes out of it.
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae", local_files_only=True).to(device, torch.float32)
    vae.requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", local_files_only=True)
    unet.requires_grad_(False).to(device, dtype).train()
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    layers = ["to_k", "to_q", "to_v", "to_out.0"]
    lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=layers)
    unet.add_adapter(lora)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return vae, unet


def _pixels(pictures: list[Path], settings: "Settings", index: int, device: Any) -> "torch.Tensor":
    return pixels_of(pictures, settings, index).to(device)


def _encode_prompt(model: Path, device: Any, dtype: Any) -> "tuple[torch.Tensor, torch.Tensor]":
    """The penultimate layers of both text encoders side by side, and the second one's projection of the prompt."""
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    states, pooled = [], None
    for part, kind in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        tokenizer = CLIPTokenizer.from_pretrained(model / f"tokenizer{part}", local_files_only=True)
        encoder = kind.from_pretrained(model, subfolder=f"text_encoder{part}", local_files_only=True)
        ids = tokenizer(PROMPT, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            said = encoder.to(device, dtype)(ids.to(device), output_hidden_states=True)
        states.append(said.hidden_states[-2])
        pooled = said[0]
    assert pooled is not None
    return torch.cat(states, dim=-1), pooled
