"""Train the embedded demo model from nothing: VAE, then text encoder and U-Net together.

    python scripts/train_demo_model.py --work demo-training vae
    python scripts/train_demo_model.py --work demo-training unet
    python scripts/train_demo_model.py --work demo-training package

Each stage writes a checkpoint every minute and goes on from it when started again. `package` writes the float16
weights to fastsd_helpers/demo/model. On two CPU cores with bf16 units (Intel AMX) a VAE step takes 0.4 to 0.8 s
and a U-Net step about 1.3 s beside other work; a GPU is used when there is one.
"""

import argparse
import contextlib
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image, ImageDraw

from fastsd_helpers.demo import MODEL_FOLDER, networks, pictures

LATENT_SCALE = 0.18215
LATENT_NOISE = 0.1  # deviation of the VAE's posterior, in units of the unscaled latent
VAE_RATE = 1e-3
TRAIN_SCENES = [scene for scene in pictures.all_scenes() if not pictures.is_held_out(scene)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vae", "unet", "package"])
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 2300 for the VAE, 2500 for the U-Net)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if DEVICE == "cpu":
        torch.nn.GroupNorm.forward = fast_group_norm
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "vae":
        train_vae(arguments.work, arguments.steps or 2300)
    elif arguments.stage == "unet":
        train_unet(arguments.work, arguments.steps or 2500)
    else:
        package(arguments.work)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def mixed_precision() -> contextlib.AbstractContextManager:
    return torch.autocast(DEVICE, torch.bfloat16)


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """RGB pictures -> float32 [n, 3, h, w] in -1..1."""
    array = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def fast_group_norm(module: torch.nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """GroupNorm on plainly laid out values: on a CPU its backward pass is 5-20 times slower on channels-last ones."""
    weight, bias = module.weight.to(x.dtype), module.bias.to(x.dtype)
    return torch.nn.functional.group_norm(x.contiguous(), module.num_groups, weight, bias, module.eps)


def draw_scribble(generator: np.random.Generator) -> Image.Image:
    """Random blobs, bars and lines of random colours: they teach the VAE details that no scene has."""
    side = pictures.SIZE_PX * 2
    background = str(generator.choice(list(pictures.BACKGROUNDS)))
    image = pictures.draw_scene(
        pictures.Scene("ball", str(generator.choice(list(pictures.COLOURS))), "in the middle", background, "flat"),
        generator,
    ).resize((side, side))
    pen = ImageDraw.Draw(image)
    for _ in range(generator.integers(3, 14)):
        x, y = generator.uniform(0, side, 2)
        w, h = generator.uniform(4, side * 0.3, 2)
        colour = tuple(int(part) for part in generator.integers(0, 256, 3))
        kind = generator.integers(4)
        if kind == 0:
            pen.ellipse((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=colour)
        elif kind == 1:
            pen.rectangle((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=colour)
        elif kind == 2:
            x2, y2 = generator.uniform(0, side, 2)
            pen.line((x, y, x2, y2), fill=colour, width=int(generator.integers(2, 12)))
        else:
            corners = [(x + generator.normal(0, w), y + generator.normal(0, h)) for _ in range(3)]
            pen.polygon(corners, fill=colour)
    return image.reduce(2)


def cosine(step: int, steps: int, warmup: int, peak: float, floor: float = 0.02) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    part = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * part)))


def save(path: Path, **state) -> None:
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    temporary.rename(path)


def train_vae(work: Path, steps: int) -> None:
    """Reconstruction (L1 and squared error) around a posterior of fixed width; first at half the size, for speed."""
    torch.manual_seed(0)
    vae = networks.build_vae().to(DEVICE)
    start_as_mean_pooling(vae)
    vae.set_attn_processor(AttnProcessor())
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    path = work / "vae.pt"
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    started = saved = time.time()
    for step in range(first, steps):
        generator = np.random.default_rng([1, step])
        whole = step >= steps * 4 // 7
        images = []
        for index in range(4 if whole else 8):
            if index % 3 == 0:
                image = draw_scribble(generator)
            else:
                image = pictures.draw_scene(TRAIN_SCENES[generator.integers(len(TRAIN_SCENES))], generator)
            if not whole:
                image = image.reduce(2)
            images.append(image)
        pixels = to_tensor(images).to(DEVICE)
        noise_source = torch.Generator().manual_seed(2_000_000 + step)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, 30, VAE_RATE)
        with mixed_precision():
            posterior = vae.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=noise_source).to(DEVICE)
            decoded = vae.decode(posterior.mean + LATENT_NOISE * noise).sample
        error = decoded.float() - pixels
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        # A Gaussian posterior of fixed width, learned far sooner than a free one: the mean is held near unit size.
        width = (logvar - 2 * math.log(LATENT_NOISE)).pow(2).mean()
        loss = error.abs().mean() + error.pow(2).mean() + 1e-3 * mean.pow(2).mean() + 1e-3 * width
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            log(
                work,
                f"vae step {step} l1 {error.abs().mean():.4f} mse {error.pow(2).mean():.5f} "
                f"latent {mean.std():.2f} seconds {time.time() - started:.0f}",
            )
        if time.time() - saved > 60 or step + 1 == steps:
            save(path, vae=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            saved = time.time()


@torch.no_grad()
def start_as_mean_pooling(vae: torch.nn.Module) -> None:
    """Start as blocks that change nothing between mean pooling and nearest-neighbour growing: learns in a tenth."""
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            module.weight.zero_()
        elif isinstance(module, torch.nn.Conv2d) and "samplers" in name:
            module.weight.mul_(0.1)
            module.bias.zero_()
            channel = torch.arange(module.weight.shape[0])
            if "downsamplers" in name:
                module.weight[channel, channel, :2, :2] += 0.25
            else:
                module.weight[channel, channel, 1, 1] += 1.0


def load_vae(work: Path) -> torch.nn.Module:
    vae = networks.build_vae()
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["vae"])
    vae.set_attn_processor(AttnProcessor())
    return vae.to(DEVICE).eval()


@torch.no_grad()
def whiten(vae: torch.nn.Module) -> None:
    """Fold a shift and a scale into quant_conv so that latents x 0.18215 have mean 0 and deviation 1.

    Every program for SD 1.5 multiplies latents by 0.18215, so the model has to fit that figure.
    """
    generator = np.random.default_rng(2)
    images = [pictures.draw_scene(TRAIN_SCENES[i], generator) for i in generator.integers(0, len(TRAIN_SCENES), 256)]
    mean = torch.cat([vae.encode(to_tensor(images[i : i + 16]).to(DEVICE)).latent_dist.mean for i in range(0, 256, 16)])
    centre = mean.mean((0, 2, 3))
    scale = 1 / (mean.std((0, 2, 3)) * LATENT_SCALE)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * centre).sum(1)
    post.weight /= scale[None, :, None, None]
    quant.weight[:4] *= scale[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - centre) * scale
    quant.bias[4:] += 2 * scale.log()  # the log-variance follows the scale


@torch.no_grad()
def encode_scenes(work: Path, vae: torch.nn.Module, rounds: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent means and deviations of `rounds` drawings of each scene: float16 [n, 4, 16, 16]; kept in `work`."""
    path = work / "latents.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        return state["mean"], state["std"]
    means, stds = [], []
    generator = np.random.default_rng(3)
    scenes = TRAIN_SCENES * rounds
    for start in range(0, len(scenes), 32):
        pixels = to_tensor([pictures.draw_scene(scene, generator) for scene in scenes[start : start + 32]])
        with mixed_precision():
            posterior = vae.encode(pixels.to(DEVICE)).latent_dist
        means.append((posterior.mean.float() * LATENT_SCALE).half().cpu())
        stds.append((posterior.std.float() * LATENT_SCALE).half().cpu())
        if start % 3200 == 0:
            log(work, f"latents {start} of {len(scenes)}")
    save(path, mean=torch.cat(means), std=torch.cat(stds))
    return torch.cat(means), torch.cat(stds)


def train_unet(work: Path, steps: int, batch_size: int = 32) -> None:
    """Noise prediction with captions dropped one time in ten, for classifier-free guidance; EMA of all weights."""
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    vocabulary = networks.build_tokenizer_files(work / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    vae = load_vae(work)
    whiten(vae)
    means, stds = encode_scenes(work, vae)
    text_encoder = networks.build_text_encoder(vocabulary).to(DEVICE)
    if DEVICE == "cpu":  # the fused attention has a slow backward pass in bf16
        text_encoder.config._attn_implementation = "eager"
    unet = networks.build_unet().to(DEVICE)
    unet.set_attn_processor(AttnProcessor())
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    averages = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    path = work / "unet.pt"
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=DEVICE)
        unet.load_state_dict(state["unet"])
        text_encoder.load_state_dict(state["text_encoder"])
        optimizer.load_state_dict(state["optimizer"])
        averages = state["averages"]
        first = state["step"]
    scheduler = networks.build_scheduler()
    alphas = scheduler.alphas_cumprod.to(DEVICE)
    started = saved = time.time()
    running = None
    for step in range(first, steps):
        draw = np.random.default_rng([4, step])
        noise_source = torch.Generator().manual_seed(1_000_000 + step)
        picks = draw.integers(0, len(means), batch_size)
        captions = [
            "" if draw.random() < 0.1 else pictures.shorten_caption(TRAIN_SCENES[pick % len(TRAIN_SCENES)], draw)
            for pick in picks
        ]
        tokens = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
        index = torch.from_numpy(picks)
        latents = means[index].float() + stds[index].float() * torch.randn(means[index].shape, generator=noise_source)
        noise = torch.randn(latents.shape, generator=noise_source)
        times = torch.randint(0, 1000, (batch_size,), generator=noise_source)
        latents, noise, times = latents.to(DEVICE), noise.to(DEVICE), times.to(DEVICE)
        signal = alphas[times].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        rate = cosine(step, steps, 200, 1e-3)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with mixed_precision():
            context = text_encoder(tokens.to(DEVICE)).last_hidden_state
            predicted = unet(noisy, times, context).sample
        loss = (predicted.float() - noise).pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], 1 - decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 25 == 0:
            log(work, f"unet step {step} loss {running:.4f} rate {rate:.2e} seconds {time.time() - started:.0f}")
        if time.time() - saved > 60 or step + 1 == steps:
            save(
                path,
                unet=unet.state_dict(),
                text_encoder=text_encoder.state_dict(),
                optimizer=optimizer.state_dict(),
                averages=averages,
                step=step + 1,
            )
            saved = time.time()


def package(work: Path, folder: Path = MODEL_FOLDER) -> None:
    """Write the Diffusers folder: EMA weights in float16, the largest file under 10 MB."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    vocabulary = networks.build_tokenizer_files(folder / "tokenizer")
    vae = load_vae(work)
    whiten(vae)
    text_encoder, unet = networks.build_text_encoder(vocabulary), networks.build_unet()
    averages = torch.load(work / "unet.pt", weights_only=True, map_location="cpu")["averages"]
    for parameter, average in zip([*unet.parameters(), *text_encoder.parameters()], averages, strict=True):
        parameter.data.copy_(average)
    pipeline = StableDiffusionPipeline(
        vae=vae.cpu(),
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=networks.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True, max_shard_size="9MB")
    log(work, f"packaged in {folder}")


def log(work: Path, line: str) -> None:
    with open(work / "log.txt", "a", encoding="utf-8") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
