"""The two loops of SD 1.5, and ours for every family."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.device import describe_device
from fastsd_helpers.images.files import read_rgb
from fastsd_helpers.inert import require_inert

if TYPE_CHECKING:
    import torch

    from fastsd_helpers.bench.clock import Clock
    from fastsd_helpers.bench.dreambooth_settings import Settings

__all__ = ["LR", "PROMPT", "RANK", "Step", "open_ours", "open_plain", "pixels_of"]

Step = Callable[[int], object]
LR = 1e-6
RANK = 16
PROMPT = "a photo of a zib robot"


def pixels_of(pictures: list[Path], settings: "Settings", index: int) -> "torch.Tensor":
    """The images of a step, read again each time: float32 [batch, 3, side, side] from -1 to 1."""
    import numpy as np
    import torch

    side, rows = settings.resolution, []
    for row in range(settings.batch_size):
        picture = read_rgb(pictures[(index * settings.batch_size + row) % len(pictures)])
        pixels = np.asarray(picture.resize((side, side)), dtype=np.float32)
        rows.append(torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1))
    return torch.stack(rows)


def open_ours(settings: "Settings", model: Path, pictures: list[Path], clock: "Clock") -> tuple[Step, float]:
    """Ours: returns one step as `train` takes it, and the seconds in which the caches were filled."""
    from fastsd_helpers.dreambooth.dataset.prepared import Dataset, PreparedImage
    from fastsd_helpers.dreambooth.settings import DreamBoothConfig, resolve_settings
    from fastsd_helpers.dreambooth.training.base_model import BaseModel
    from fastsd_helpers.dreambooth.training.stages import TrainingContext, open_stage

    base, device = BaseModel.fetch(str(model)), describe_device()
    config = DreamBoothConfig(
        base_model=str(model),
        method="lora" if settings.family == "sdxl" else "full",
        lora_rank=RANK,
        lora_targets="attention",
        resolution=settings.resolution,
        batch_size=settings.batch_size,
        precision=settings.precision,
        optimizer="adamw",
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    config, _ = resolve_settings(config, base.spec, device)
    context = TrainingContext(base, config, device)
    began = clock.now()
    context.fill_caches(Dataset(tuple(PreparedImage(path, "", PROMPT) for path in pictures), ()))
    job = open_stage("unet", context, None)
    caches = clock.now() - began
    optimizer = job.stepper.optimizer
    plain_step = optimizer.step

    def timed_step(*args: Any, **options: Any) -> Any:
        with clock.part("optimizer"):
            return plain_step(*args, **options)

    optimizer.step = timed_step
    return lambda index: job.take_step(index, LR), caches


def open_plain(settings: "Settings", model: Path, pictures: list[Path], clock: "Clock") -> tuple[Step, float]:
    """Written from the published script's order of events with diffusers' own classes; nothing of ours is in it."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    require_inert(model)
    device = torch.device(describe_device().kind)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[settings.precision]
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae", local_files_only=True, torch_dtype=dtype).to(device)
    text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder", local_files_only=True)
    text_encoder.to(device, dtype).requires_grad_(False)
    vae.requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", local_files_only=True).to(device).train()
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    schedule = DDPMScheduler.from_pretrained(model, subfolder="scheduler", local_files_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer", local_files_only=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LR, weight_decay=1e-2)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    half = dtype is not torch.float32

    def step(index: int) -> None:
        pixels = pixels_of(pictures, settings, index).to(device, dtype)
        ids = tokenizer(
            [PROMPT] * settings.batch_size,
            padding="max_length",
            max_length=77,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(device)
        with torch.autocast(device.type, dtype) if half else contextlib.nullcontext():
            with clock.part("vae"):
                latents = vae.encode(pixels).latent_dist.sample()
                latents = latents * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, schedule.config.num_train_timesteps, (len(latents),), device=device)
            with clock.part("text"):
                hidden = text_encoder(ids)[0]
            predicted = unet(schedule.add_noise(latents, noise, timesteps), timesteps, hidden).sample
            loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        with clock.part("optimizer"):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss.item()  # the script shows it in its bar

    return step, 0.0
