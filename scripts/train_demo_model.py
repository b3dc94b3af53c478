"""Train the embedded demo model from nothing: VAE, then text encoder and U-Net together.

    python scripts/train_demo_model.py --work demo-training vae --until 600
    python scripts/train_demo_model.py --work demo-training unet
    python scripts/train_demo_model.py --work demo-training vae
    python scripts/train_demo_model.py --work demo-training package
    python scripts/train_demo_model.py --work demo-more unet --start fastsd_helpers/demo/model --steps 1400
    python scripts/train_demo_model.py --work demo-more package --start fastsd_helpers/demo/model

Each stage writes a checkpoint every minute and goes on from it when started again. `package` writes the float16
weights to fastsd_helpers/demo/model. With `--start` the U-Net and the text encoder of a packaged model are trained on,
on its VAE, which stays as it is. A GPU is used when there is one. On two processors (AVX-512 with bf16) a VAE step
takes about 0.65 s and a U-Net step 1.2 s, two hours in all, when glibc is told to keep the memory it has; it spends a
third of the time on giving blocks back to the kernel otherwise:

    export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456 OMP_WAIT_POLICY=passive
"""

import argparse
import contextlib
import math
import time
from pathlib import Path

import demo_networks as networks
import demo_pictures as pictures
import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image, ImageDraw

from fastsd_helpers.demo import MODEL_FOLDER

LATENT_SCALE = 0.18215
ENCODER_STEPS = 600  # then the encoder stays as it is, so that the U-Net can be trained before the decoder is done
LATENT_NOISE = 0.05  # deviation of the VAE's posterior, in units of the unscaled latent
VAE_RATE = 3e-4
TRAIN_SCENES = [scene for scene in pictures.all_scenes() if not pictures.is_held_out(scene)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vae", "unet", "package"])
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 1500 for the VAE, 1800 for the U-Net)")
    parser.add_argument("--until", type=int, help="stop after this step, to go on later with the same --steps")
    parser.add_argument("--start", type=Path, help="go on with the U-Net and text encoder of this packaged model")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if DEVICE == "cpu":
        torch.nn.GroupNorm.forward = fast_group_norm
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "vae":
        train_vae(arguments.work, arguments.steps or 1500, until=arguments.until)
    elif arguments.stage == "unet":
        train_unet(arguments.work, arguments.steps or 1800, until=arguments.until, start=arguments.start)
    else:
        package(arguments.work, start=arguments.start)


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


def train_vae(work: Path, steps: int, *, until: int | None = None) -> None:
    """Reconstruction (L1 and squared error) around a posterior of fixed width."""
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
    running = None
    started = saved = time.time()
    last = min(steps, until or steps)
    for step in range(first, last):
        if step == ENCODER_STEPS or (step == first and first > ENCODER_STEPS):
            for part in (vae.encoder, vae.quant_conv):
                part.requires_grad_(False)
        generator = np.random.default_rng([1, step])
        images = [draw_scribble(generator)]
        images += [
            pictures.draw_scene(TRAIN_SCENES[index], generator) for index in generator.integers(0, len(TRAIN_SCENES), 3)
        ]
        pixels = to_tensor(images).to(DEVICE)
        noise_source = torch.Generator().manual_seed(2_000_000 + step)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, 100, VAE_RATE)
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
        scene_error = error[1:].pow(2).mean().item()
        running = scene_error if running is None else 0.96 * running + 0.04 * scene_error
        if step % 25 == 0:
            log(
                work,
                f"vae step {step} mean squared error of scenes {running:.5f} "
                f"latent {mean.std():.2f} seconds {time.time() - started:.0f}",
            )
        if time.time() - saved > 60 or step + 1 == last:
            save(path, vae=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            saved = time.time()


@torch.no_grad()
def start_as_mean_pooling(vae: torch.nn.Module) -> None:
    """Start with latents 0-2 = the mean colour of each 8 x 8 square, and a decoder that paints those squares.

    The two last GroupNorms have two channels a group, and would make every plain picture the same grey. So the pair
    that carries a colour c holds P + c and P - c, where P is a strong pattern, the same for each picture (a frame,
    made by the zero padding of the middle block's last convolution): the norm's mean and deviation are then P's.
    """
    colour = torch.arange(3)
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            module.weight.zero_()
            module.bias.zero_()
        elif isinstance(module, torch.nn.Conv2d) and "samplers" in name:
            module.weight.mul_(0.1)
            module.bias.zero_()
            channel = torch.arange(module.weight.shape[0])
            carry_through(module, 0.0)
            if "downsamplers" in name:
                module.weight[channel, channel, :2, :2] += 0.25
            else:
                module.weight[channel, channel, 1, 1] += 1.0
        elif name.endswith("conv_shortcut"):
            carry_through(module, 1.0)
    for coder, values in ((vae.encoder, 4), (vae.decoder, 3)):
        coder.conv_in.weight[:6] = 0
        coder.conv_in.bias[:6] = 0
        coder.conv_in.weight[2 * colour, colour, 1, 1] = 1.0
        coder.conv_in.weight[2 * colour + 1, colour, 1, 1] = -1.0
        draw_frame(coder.mid_block.resnets[1])
        coder.conv_norm_out.weight[:6] = FRAME_DEVIATION
        coder.conv_norm_out.bias[:6] = 4.0  # where SiLU is almost straight
        coder.conv_out.weight.mul_(0.1)
        coder.conv_out.weight[:3] = 0
        coder.conv_out.weight[:, :6] = 0
        coder.conv_out.weight[values:] = 0
        coder.conv_out.bias.zero_()
        coder.conv_out.weight[colour, 2 * colour, 1, 1] = 0.49
        coder.conv_out.weight[colour, 2 * colour + 1, 1, 1] = -0.49
        coder.conv_out.bias[values:] = 2 * math.log(LATENT_NOISE)
    for projection in (vae.quant_conv, vae.post_quant_conv):
        projection.weight.copy_(torch.eye(projection.weight.shape[0])[:, :, None, None])
        projection.bias.zero_()


FRAME_DEVIATION = 1.5


def draw_frame(block: torch.nn.Module) -> None:
    """Make a residual block add a frame of mean 0 to channels 0-5 of a 16 x 16 picture."""
    block.conv1.weight[:2] = 0
    block.conv1.bias[0], block.conv1.bias[1] = 1.0, -1.0  # after the norm: 1 and -1 everywhere
    ones = torch.ones(1, 1, 16, 16)
    frame = torch.nn.functional.conv2d(ones, torch.ones(1, 1, 3, 3), padding=1)
    scale = FRAME_DEVIATION / frame.std()
    block.conv2.weight[:6, 0] = -scale / torch.nn.functional.silu(ones[0, 0, 0, 0])
    block.conv2.bias[:6] = scale * frame.mean()


def carry_through(convolution: torch.nn.Conv2d, weight: float) -> None:
    """Let the first six channels through unchanged (times `weight`), unmixed with the others."""
    convolution.weight[:6] = 0
    convolution.bias[:6] = 0
    centre = convolution.kernel_size[0] // 2
    channel = torch.arange(6)
    convolution.weight[channel, channel, centre, centre] = weight


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


def train_unet(
    work: Path, steps: int, batch_size: int = 64, *, until: int | None = None, start: Path | None = None
) -> None:
    """Noise prediction with captions dropped one time in ten, for classifier-free guidance; EMA of all weights.

    Errors at noisy steps, where object, colour and place are decided, count more: the weight 1 / alpha makes the loss
    that of v-prediction (Salimans & Ho 2022, "Progressive Distillation", section 4), here cut off at 32, and a third of
    the pictures are very noisy ones. The first steps after `start` see nothing else (half of a batch): 1,800 steps with
    a limit of 8 and all noise levels alike taught object, colour, background and style, but nothing of the place,
    which is decided where the picture is a few hundredths of what the network sees; 200 such steps begin with it.
    Only the steps after `start` were made this way: from nothing, these limits have not been tried.
    """
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    vocabulary = networks.build_tokenizer_files(work / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    if start is None:
        vae = load_vae(work)
        whiten(vae)
        text_encoder, unet = networks.build_text_encoder(vocabulary), networks.build_unet()
        start_with_words(text_encoder)
    else:
        vae, text_encoder, unet = load_packaged(start)
    means, stds = encode_scenes(work, vae)
    place_steps = PLACE_STEPS if start else 0
    text_encoder.to(DEVICE)
    if DEVICE == "cpu":  # the fused attention has a slow backward pass in bf16
        text_encoder.config._attn_implementation = "eager"
    unet.to(DEVICE)
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
    last = min(steps, until or steps)
    for step in range(first, last):
        draw = np.random.default_rng([4, step])
        noise_source = torch.Generator().manual_seed(1_000_000 + step)
        size = batch_size if step >= place_steps else batch_size // 2
        picks = draw.integers(0, len(means), size)
        captions = [
            "" if draw.random() < 0.1 else pictures.shorten_caption(TRAIN_SCENES[pick % len(TRAIN_SCENES)], draw)
            for pick in picks
        ]
        tokens = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
        index = torch.from_numpy(picks)
        latents = means[index].float() + stds[index].float() * torch.randn(means[index].shape, generator=noise_source)
        noise = torch.randn(latents.shape, generator=noise_source)
        times = torch.randint(0, 1000, (size,), generator=noise_source)
        noisy_part = size if step < place_steps else size // 3
        times[:noisy_part] = NOISY + times[:noisy_part] * (1000 - NOISY) // 1000
        latents, noise, times = latents.to(DEVICE), noise.to(DEVICE), times.to(DEVICE)
        signal = alphas[times].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        rate = 1e-3 * min(1, (step + 1) / 50) if step < place_steps else cosine(step, steps, 200, 1e-3)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with mixed_precision():
            context = text_encoder(tokens.to(DEVICE)).last_hidden_state
            predicted = unet(noisy, times, context).sample
        weight = (1 / signal).clamp(max=200.0 if step < place_steps else 32.0)
        loss = (weight * (predicted.float() - noise).pow(2)).mean() / weight.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1 - place_steps) / (step + 10 - place_steps)) if step >= place_steps else 0.0
        torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], 1 - decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 25 == 0:
            log(work, f"unet step {step} loss {running:.4f} rate {rate:.2e} seconds {time.time() - started:.0f}")
        if time.time() - saved > 60 or step + 1 == last:
            save(
                path,
                unet=unet.state_dict(),
                text_encoder=text_encoder.state_dict(),
                optimizer=optimizer.state_dict(),
                averages=averages,
                step=step + 1,
            )
            saved = time.time()


NOISY = 880  # from this noise level on, of 1000
PLACE_STEPS = 450


def load_packaged(folder: Path) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """VAE, text encoder and U-Net of a packaged model, in fp32."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    vae.set_attn_processor(AttnProcessor())
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    return vae.to(DEVICE).eval(), text_encoder.train(), unet.train()


@torch.no_grad()
def start_with_words(text_encoder: torch.nn.Module) -> None:
    """Start as a text encoder whose output says which word stands where: small blocks on large word embeddings."""
    torch.nn.init.normal_(text_encoder.get_input_embeddings().weight, std=0.5)
    for name, parameter in text_encoder.named_parameters():
        if name.endswith("position_embedding.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif name.endswith(("out_proj.weight", "fc2.weight")):
            parameter.mul_(0.5)


def package(work: Path, folder: Path = MODEL_FOLDER, *, start: Path | None = None) -> None:
    """Write the Diffusers folder: EMA weights in float16, the largest file under 10 MB. With `start`, its VAE."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    vocabulary = networks.build_tokenizer_files(folder / "tokenizer")
    if start is None:
        vae = load_vae(work)
        whiten(vae)
        text_encoder, unet = networks.build_text_encoder(vocabulary), networks.build_unet()
    else:
        vae, text_encoder, unet = load_packaged(start)
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
