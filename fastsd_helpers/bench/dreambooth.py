"""How long an optimizer step of the U-Net takes beside a plain loop, with the split and the peak memory of both.

The plain loop does what diffusers' examples/dreambooth/train_dreambooth.py does at every step: read the image, encode
it with the VAE, encode the prompt with the text encoder, and train the U-Net. Model, images, precision and batch are
the same; each round of each loop is a process of its own, the two take turns, and the medians are compared.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fastsd_helpers.bench import Report
from fastsd_helpers.errors import TrainingFailed
from fastsd_helpers.images.files import read_rgb
from fastsd_helpers.inert import require_inert
from fastsd_helpers.options import check, option
from fastsd_helpers.runtime import describe_device, make_cpu_sums_repeatable, peak_memory_bytes, versions

__all__ = ["LOOPS", "Settings", "make_model", "measure"]

_PROMPT = "a photo of a zib robot"
# Divisors of Stable Diffusion 1.5's widths. At a quarter and 256 px the VAE's encoder does 0.455 of the multiplications
# of the U-Net's step (forward and backward), near the 0.463 of the whole model at 512 px. That is work, not time: on a
# CPU the narrow U-Net spends much of its time in norms and copies, so caching gains less there than at full width.
_DIVISORS = {"quarter": 4, "sd15": 1}
_SIDES = {"demo": 128, "quarter": 256, "sd15": 512}
_BATCHES = {"demo": 4, "quarter": 1, "sd15": 1}  # as models.toml has them
_WARM_UP = 2


@dataclass(frozen=True)
class Settings:
    """What is measured, and how often."""

    model: Literal["demo", "quarter", "sd15"] = option(
        "demo", help="the embedded model; SD 1.5 at a quarter of its widths; or all of it (random weights, for a GPU)"
    )
    resolution: int = option(0, help="resolution: side of the images in pixels; 0 = the model's own", low=0, high=1024)
    batch_size: int = option(0, help="batch size; 0 = the model's default", low=0, high=16)
    precision: Literal["fp32", "fp16", "bf16"] = option("fp32", help="precision: dtype of the forward pass")
    gradient_checkpointing: bool = option(False, help="gradient checkpointing in both loops: less memory, slower")
    steps: int = option(10, help="timed steps per round", low=1, high=1000)
    rounds: int = option(3, help="rounds per loop; the median is reported", low=1, high=25)
    threads: int = option(0, help="CPU threads; 0 = torch's default", low=0, high=256)

    def __post_init__(self) -> None:
        check(self)


def measure(settings: Settings) -> Report:
    """Time both loops in turns.

    Raises:
        TrainingFailed: a round's process ended without a result; its last words are in the problem.
    """
    settings = replace(
        settings,
        resolution=settings.resolution or _SIDES[settings.model],
        batch_size=settings.batch_size or _BATCHES[settings.model],
    )
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in LOOPS}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(settings.model, Path(folder) / "model")
        pictures = _make_pictures(Path(folder) / "pictures", settings)
        for _ in range(settings.rounds):
            for name in LOOPS:
                found[name].append(_in_own_process(name, settings, model, pictures))
    medians = {name: _median(rounds) for name, rounds in found.items()}
    ratio = medians["plain"]["step"] / medians["ours"]["step"]
    device = describe_device()
    data = {
        "settings": asdict(settings),
        "ratio": ratio,
        "ratios": [a["step"] / b["step"] for a, b in zip(found["plain"], found["ours"], strict=True)],
        "medians": medians,
        "rounds": found,
        "machine": {"device": device.name, "cores": os.cpu_count(), "platform": platform.platform()},
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    return Report(data, _in_words(settings, medians, ratio))


def _in_words(settings: Settings, medians: dict[str, dict[str, Any]], ratio: float) -> list[str]:
    lines = [
        f"Model {settings.model}, {settings.resolution} px, {settings.precision}, "
        f"batch {settings.batch_size}: median of {settings.rounds} rounds of {settings.steps} steps"
    ]
    for name, values in medians.items():
        split = ", ".join(f"{part} {seconds * 1000:.1f}" for part, seconds in values["split"].items())
        lines.append(
            f"  {name:5}  {values['step'] * 1000:8.1f} ms a step ({split}); peak memory {values['peak'] / 1e6:.0f} MB"
        )
    lines.append(f"  ours fills its caches once in {medians['ours']['caches']:.2f} s")
    lines.append(f"  baseline / ours = {ratio:.2f}")
    return lines


def _median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "step": statistics.median(each["step"] for each in rounds),
        "split": {part: statistics.median(each["split"][part] for each in rounds) for part in rounds[0]["split"]},
        "peak": statistics.median(each["peak"] for each in rounds),
        "caches": statistics.median(each["caches"] for each in rounds),
    }


# ------------------------------------------------------------------------------------------ what is measured


def make_model(name: str, folder: Path) -> Path:
    """The embedded model, or a new folder with Stable Diffusion 1.5's networks at some width and random weights."""
    from fastsd_helpers.demo import MODEL_FOLDER

    if name == "demo":
        return MODEL_FOLDER
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    part = _DIVISORS[name]
    groups = 32 if part == 1 else 16
    tokenizer = CLIPTokenizer.from_pretrained(MODEL_FOLDER / "tokenizer", local_files_only=True)
    vocabulary = len(tokenizer)
    width = 768 // part
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=12 // part,
            num_hidden_layers=12,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
        )
    )
    diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=tuple(channels // part for channels in (128, 256, 512, 512)),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=groups,
        ),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            sample_size=_SIDES[name] // 8,
            block_out_channels=tuple(channels // part for channels in (320, 640, 1280, 1280)),
            cross_attention_dim=width,
            attention_head_dim=8 // part,  # so diffusers calls the number of heads; each is as wide as the original's
            norm_num_groups=groups,
        ),
        scheduler=diffusers.DDIMScheduler.from_pretrained(MODEL_FOLDER / "scheduler", local_files_only=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def _make_pictures(folder: Path, settings: Settings) -> list[Path]:
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    side = settings.resolution
    paths = []
    for index in range(4):
        coarse = Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        paths.append(folder / f"{index}.png")
        coarse.resize((side, side)).save(paths[-1])
    return paths


def _in_own_process(name: str, settings: Settings, model: Path, pictures: list[Path]) -> dict[str, Any]:
    """A new interpreter for each round: peak memory is a process's, and one loop warms nothing for the other."""
    import multiprocessing  # leaves a module of its own name behind at once

    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        process = multiprocessing.get_context("spawn").Process(
            target=_run_round, args=(name, settings, model, pictures, answer)
        )
        process.start()
        process.join()
        if process.exitcode != 0 or not answer.is_file():
            raise TrainingFailed(
                f"The {name} loop ended with exit code {process.exitcode}.",
                "Its message is above; exit code -9 means that memory ran out: choose a smaller model or resolution.",
            )
        return json.loads(answer.read_text())


def _run_round(name: str, settings: Settings, model: Path, pictures: list[Path], answer: Path) -> None:
    make_cpu_sums_repeatable()
    import torch

    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = describe_device()
    clock = _Clock(device.kind)
    step, caches = LOOPS[name](settings, model, pictures, clock)
    for index in range(_WARM_UP):
        step(index)
    clock.start()
    for index in range(_WARM_UP, _WARM_UP + settings.steps):
        step(index)
    seconds = clock.stop()
    split = {part: spent / settings.steps for part, spent in clock.parts.items()}
    split["rest"] = seconds / settings.steps - sum(split.values())
    found = {
        "step": seconds / settings.steps,
        "split": split,
        "peak": peak_memory_bytes("cuda" if device.kind == "cuda" else "host"),
        "caches": caches,
    }
    answer.write_text(json.dumps(found))


class _Clock:
    """Seconds of parts of a step; a GPU is waited for at both ends of each part, in both loops alike."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self.parts: dict[str, float] = dict.fromkeys(("vae", "text", "optimizer"), 0.0)

    def _now(self) -> float:
        if self._kind == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self) -> None:
        """Forget the warm-up."""
        self.parts = dict.fromkeys(self.parts, 0.0)
        self._began = self._now()

    def stop(self) -> float:
        """Seconds since `start`."""
        return self._now() - self._began

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is done inside to a part."""
        began = self._now()
        yield
        self.parts[name] += self._now() - began


# ------------------------------------------------------------------------------------------------- the loops

Step = Callable[[int], object]
_LR = 1e-6


def _open_ours(settings: Settings, model: Path, pictures: list[Path], clock: _Clock) -> tuple[Step, float]:
    from fastsd_helpers.dreambooth.dataset.prepared import Dataset, PreparedImage
    from fastsd_helpers.dreambooth.settings import DreamBoothConfig, resolve_settings
    from fastsd_helpers.dreambooth.training.base_model import BaseModel
    from fastsd_helpers.dreambooth.training.stages import TrainingContext, open_stage

    base, device = BaseModel.fetch(str(model)), describe_device()
    config = DreamBoothConfig(
        base_model=str(model),
        resolution=settings.resolution,
        batch_size=settings.batch_size,
        precision=settings.precision,
        optimizer="adamw",
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    config, _ = resolve_settings(config, base.spec, device)
    context = TrainingContext(base, config, device)
    began = clock._now()
    context.fill_caches(Dataset(tuple(PreparedImage(path, "", _PROMPT) for path in pictures), ()))
    job = open_stage("unet", context, None)
    caches = clock._now() - began
    plain_step = job.optimizer.step

    def timed_step(*args: Any, **options: Any) -> Any:
        with clock.part("optimizer"):
            return plain_step(*args, **options)

    job.optimizer.step = timed_step
    return lambda index: job.take_step(index, _LR), caches


def _open_plain(settings: Settings, model: Path, pictures: list[Path], clock: _Clock) -> tuple[Step, float]:
    """Written from the published script's order of events with diffusers' own classes; nothing of ours is in it."""
    import contextlib

    import numpy as np
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
    side = settings.resolution
    optimizer = torch.optim.AdamW(unet.parameters(), lr=_LR, weight_decay=1e-2)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    half = dtype is not torch.float32

    def step(index: int) -> None:
        rows = []
        for row in range(settings.batch_size):
            picture = read_rgb(pictures[(index * settings.batch_size + row) % len(pictures)])
            pixels = np.asarray(picture.resize((side, side)), dtype=np.float32)
            rows.append(torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1))
        ids = tokenizer(
            [_PROMPT] * settings.batch_size,
            padding="max_length",
            max_length=77,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(device)
        with torch.autocast(device.type, dtype) if half else contextlib.nullcontext():
            with clock.part("vae"):
                latents = vae.encode(torch.stack(rows).to(device, dtype)).latent_dist.sample()
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


LOOPS = {"plain": _open_plain, "ours": _open_ours}
