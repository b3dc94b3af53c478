"""Sample images of a model in training, and the grids they are shown in."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.dreambooth.families import Conditions, Framing
from fastsd_helpers.dreambooth.training.base_model import BaseModel
from fastsd_helpers.dreambooth.training.stages import TrainingContext
from fastsd_helpers.errors import Interrupted
from fastsd_helpers.files import write_atomic
from fastsd_helpers.images.files import png_bytes

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = ["draw_grid", "draw_pictures", "draw_with", "sample_prompts", "save_picture"]

_LEAST_SHOWN_PX = 192  # of an image in a grid


def draw_pictures(
    base: BaseModel,
    unet: Any,
    vae: Any,
    text: Conditions,
    empty: Conditions,
    *,
    size: int | tuple[int, int],
    seeds: Sequence[int],
    steps: int = 25,
    guidance: float = 7.5,
    device: Any,
    after_step: Callable[[], None] = lambda: None,
    stopped: Callable[[], bool] = lambda: False,
) -> "list[Image.Image]":
    """Draw one image per row of `text` from the noise of its seed; `size` is a square's side, or width and height.

    Classifier-free guidance as in Ho and Salimans 2022, with the family's sampler. The noise is
    drawn on the CPU: equal seeds give equal images' beginnings on every device, before and after training. At
    guidance 1 the prompt alone is asked, which takes half the time. `after_step` is called after each of the steps,
    `stopped` is asked before each of them and before each image is decoded.

    Raises:
        Interrupted: `stopped` said so.
    """
    import numpy as np
    import torch
    from PIL import Image

    family, sampler = base.family, base.load_sampler()
    sampler.set_timesteps(steps, device=device)
    width, height = (size, size) if isinstance(size, int) else size
    shape = family.latent_shape(width, height)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.stack(noise).to(device) * sampler.init_noise_sigma
    guided = guidance != 1
    no_text = empty[[0] * len(seeds)].long_as(text)
    context = (Conditions.join([no_text, text]) if guided else text).to(device)
    numbers = family.picture_numbers([Framing.whole(width, height)] * len(context), width, height)
    told = None if numbers is None else numbers.to(device)
    rescale = family.guidance_rescale(base.spec)
    extra = torch.Generator().manual_seed(seeds[0]) if seeds else None
    takes_generator = "generator" in sampler.step.__code__.co_varnames
    with torch.no_grad():
        for timestep in sampler.timesteps:
            _end_if(stopped())
            asked = sampler.scale_model_input(torch.cat([latents, latents]) if guided else latents, timestep)
            predicted = family.predict(unet, asked, timestep, context, told).float()
            if guided:
                without, with_text = predicted.chunk(2)
                predicted = without + guidance * (with_text - without)
                if rescale:
                    predicted = _rescale(predicted, with_text, rescale)
            options = {"generator": extra} if takes_generator else {}
            latents = sampler.step(predicted, timestep, latents, **options).prev_sample
            after_step()
        pixels = []
        for row in latents.float():
            _end_if(stopped())
            pixels.append(family.decode(vae, row[None]))
    values = ((torch.cat(pixels).float().clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in values.astype(np.uint8)]


def _end_if(stopped: bool) -> None:
    if stopped:
        raise Interrupted("Stopped while images were generated.", "Train again with the same session to resume.")


def _rescale(guided: "torch.Tensor", with_text: "torch.Tensor", share: float) -> "torch.Tensor":
    """Take back what guidance adds to the contrast.

    Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4.
    """
    own, wanted = (values.flatten(1).std(1)[:, None, None, None] for values in (guided, with_text))
    return share * guided * (wanted / own) + (1 - share) * guided


def draw_with(context: TrainingContext, vae: Any, prompts: list[str], **options: Any) -> "list[Image.Image]":
    """Draw an image of each prompt with the context's networks as they are; `options` are those of `draw_pictures`."""
    text = context.encode_prompts([*prompts, ""])
    unet, size = context.load_denoiser(), context.config.resolution
    with context.autocast():
        return draw_pictures(context.base, unet, vae, text[:-1], text[-1:], size=size, device=context.device, **options)


def sample_prompts(context: TrainingContext, count: int = 4) -> list[str]:
    """Up to so many different training prompts; one prompt alone is drawn with as many seeds."""
    prompts = list(dict.fromkeys(context.prompts[index] for index in context.prompt_of))
    if len(prompts) <= count:
        return (prompts * count)[:count] if len(prompts) == 1 else prompts
    # Spread over all of them: with several subjects the first few prompts are all of the first one.
    return [prompts[index * len(prompts) // count] for index in range(count)]


def draw_grid(rows: "list[list[Image.Image]]", titles: list[str], captions: list[str] | None = None) -> "Image.Image":
    """Lay images out in titled rows, with a caption over each column."""
    from PIL import Image, ImageDraw, ImageFont

    side = rows[0][0].width
    shown = max(side, _LEAST_SHOWN_PX)
    # The words are as large beside large images: the sheet is shown at one width, whatever its own.
    gap, line, title_width, letters = (round(px * shown / _LEAST_SHOWN_PX) for px in (8, 20, 96, 15))
    top = gap + (3 * line if captions else 0)
    width = title_width + len(rows[0]) * (shown + gap) + gap
    sheet = Image.new("RGB", (width, top + len(rows) * (shown + gap) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(letters)
    for index, caption in enumerate(captions or []):
        left = title_width + index * (shown + gap)
        for number, text in enumerate(_wrap(pen, caption, font, shown)[:3]):
            pen.text((left, gap + number * line), text, fill=(60, 60, 60), font=font)
    for row, (pictures, title) in enumerate(zip(rows, titles, strict=True)):
        y = top + row * (shown + gap)
        pen.text((gap, y + shown // 2 - line // 2), title, fill="black", font=font)
        for column, picture in enumerate(pictures):
            resized = picture.resize((shown, shown), Image.Resampling.LANCZOS)
            sheet.paste(resized, (title_width + column * (shown + gap), y))
    return sheet


def _wrap(pen: Any, text: str, font: Any, width: int) -> list[str]:
    lines, current = [], ""
    for word in text.split():
        longer = f"{current} {word}".strip()
        if current and pen.textlength(longer, font=font) > width:
            lines.append(current)
            current = word
        else:
            current = longer
    return [*lines, current]


def save_picture(picture: "Image.Image", path: Path) -> None:
    """Write a PNG so that it is whole or not there."""
    write_atomic(path, png_bytes(picture))
