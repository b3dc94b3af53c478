"""How a model is drawn with: the steps, guidance and scheduler that its family was made for."""

import inspect
from dataclasses import dataclass
from typing import Any

__all__ = ["DrawingHabits", "habits_of"]


@dataclass(frozen=True)
class DrawingHabits:
    """What is used when nothing else is asked for, and what this model's pipeline takes at all.

    Attributes:
        steps: 1 to 200.
        guidance: classifier-free guidance scale, 0 to 20; for Flux.1 dev the number that its transformer is given.
        takes_negative: whether a negative prompt means something; not for models distilled to do without guidance.
        multiple: sides of images are multiples of this, in pixels.
        extra: more words for the pipeline's call.
    """

    steps: int
    guidance: float
    takes_negative: bool = True
    multiple: int = 8
    extra: tuple[tuple[str, Any], ...] = ()


def habits_of(pipe: Any) -> DrawingHabits:
    """Tell the habits of a loaded pipeline from its configuration; its scheduler is fixed for zero terminal SNR.

    A model trained with zero terminal SNR (`rescale_betas_zero_snr`) begins from pure noise: it needs a scheduler that
    knows it, "trailing" steps, and guidance that is rescaled (0.7), or its images are washed out or black.

    Source: Lin et al. 2023, arXiv:2305.08891 (zero SNR, phi = 0.7); the published model cards and diffusers' docs of
    Flux.1 dev (3.5, 28 steps here), Flux.1 schnell (4 steps, no guidance, 256 tokens), SDXL, LCM, SD and SDXL Turbo,
    Playground v2.5 (guidance 3).
    """
    transformer, unet = getattr(pipe, "transformer", None), getattr(pipe, "unet", None)
    if transformer is not None:
        if transformer.config.get("guidance_embeds"):
            return DrawingHabits(28, 3.5, takes_negative=False, multiple=16)
        return DrawingHabits(4, 0.0, takes_negative=False, multiple=16, extra=(("max_sequence_length", 256),))
    scheduler = getattr(pipe, "scheduler", None)
    if unet is None or scheduler is None:
        return DrawingHabits(25, 7.5)
    name, config = type(scheduler).__name__, scheduler.config
    if config.get("rescale_betas_zero_snr"):
        pipe.scheduler = _for_zero_snr(scheduler)
        steps, guidance = (30, 5.0) if hasattr(pipe, "text_encoder_2") else (25, 7.5)
        return DrawingHabits(steps, guidance, extra=(("guidance_rescale", 0.7),))
    if name == "LCMScheduler":
        # One that was distilled whole is told its guidance; with a LoRA it is ordinary guidance, of which 1 is none.
        whole = unet.config.get("time_cond_proj_dim") is not None
        return DrawingHabits(4 if whole else 6, 8.0 if whole else 1.0, takes_negative=False)
    if name.startswith("Euler") and config.get("timestep_spacing") == "trailing":
        return DrawingHabits(2, 0.0, takes_negative=False)
    if name.startswith("EDM"):
        return DrawingHabits(30, 3.0)
    return DrawingHabits(30, 5.0) if hasattr(pipe, "text_encoder_2") else DrawingHabits(25, 7.5)


def _for_zero_snr(scheduler: Any) -> Any:
    kind: Any = type(scheduler)
    if "rescale_betas_zero_snr" not in inspect.signature(kind.__init__).parameters:
        from diffusers import EulerDiscreteScheduler

        kind = EulerDiscreteScheduler
    return kind.from_config(scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing")
