"""Stable Diffusion XL and its children: two text encoders, each image's size and crop, noise or velocity.

Sources: Podell et al. 2023, "SDXL"; for velocity with a schedule that ends in pure noise, Lin et al. 2023, "Common
Diffusion Noise Schedules and Sample Steps are Flawed".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fastsd_helpers.dreambooth.families.conditions import Conditions
from fastsd_helpers.dreambooth.families.diffusion import Diffusion
from fastsd_helpers.dreambooth.families.family import Counts, Ids, PublishedStep
from fastsd_helpers.dreambooth.families.framing import Framing
from fastsd_helpers.dreambooth.families.stable_diffusion import (
    CLIP_LAYERS,
    SIMPLE_TUNER,
    UNET_LAYERS,
    StableDiffusion1,
    load_scheduler,
)
from fastsd_helpers.registry import ModelSpec

if TYPE_CHECKING:
    import torch

__all__ = ["StableDiffusionXL"]

_CHUNK = 75  # tokens that a text encoder reads at once, besides start and end
_CHUNKS = 3
_TILED_ABOVE_PX = 1024  # the float32 VAE's memory grows with the area
_SIZE_NUMBERS = 6


class StableDiffusionXL(StableDiffusion1):
    """Stable Diffusion XL."""

    parts: ClassVar[Mapping[str, tuple[str, str]]] = {
        **StableDiffusion1.parts,
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    }
    encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    trained_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    half_base = True
    large = True
    most_tokens = _CHUNKS * _CHUNK + 2
    lora_layers: ClassVar[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
        "unet": UNET_LAYERS,
        "text_encoder": CLIP_LAYERS,
        "text_encoder_2": CLIP_LAYERS,
    }
    published: ClassVar[Mapping[str, Counts]] = {
        "attention": Counts(2_567_463_684, 817_720_320, 83_653_863, 1_451_520, 401_408),
        "all linears": Counts(2_567_463_684, 817_720_320, 83_653_863, 2_659_840, 903_168),
    }
    steps_of_others: ClassVar[tuple[PublishedStep, ...]] = (
        PublishedStep("H100", 1024, True, 1.080, SIMPLE_TUNER),
        PublishedStep("H100", 1024, False, 0.606, SIMPLE_TUNER),
        PublishedStep("L40S", 1024, False, 0.585, SIMPLE_TUNER),
    )
    forward_teraflops: ClassVar[Mapping[int, float]] = {512: 1.589, 768: 3.641, 1024: 6.761}

    def tokenize(self, tokenizers: Mapping[str, Any], prompts: list[str]) -> Ids:
        """Ids int64 [n, chunks, 77]: as many chunks of 75 as the longest prompt needs, three at the most.

        Each chunk has a start and an end of its own and is padded as its tokenizer pads: the first with its end token,
        the second with id 0. A shorter prompt is followed by chunks of the empty text, as web UIs do.
        """
        import torch

        texts = {
            part: [tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids for prompt in prompts]
            for part, tokenizer in tokenizers.items()
        }
        longest = max((len(text) for part in texts.values() for text in part), default=0)
        chunks = min(_CHUNKS, max(1, -(-longest // _CHUNK)))
        found = {}
        for part, tokenizer in tokenizers.items():
            start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
            rows = []
            for text in texts[part]:
                pieces = [text[at * _CHUNK : (at + 1) * _CHUNK] for at in range(chunks)]
                rows.append([[start, *piece, end, *[pad] * (_CHUNK - len(piece))] for piece in pieces])
            found[part] = torch.tensor(rows, dtype=torch.int64).reshape(len(prompts), chunks, _CHUNK + 2)
        return found

    def encode(self, encoders: Mapping[str, Any], ids: Ids) -> Conditions:
        """Both encoders' last layer but one side by side, and the second one's projected vector of the first chunk."""
        import torch

        sequences, pooled = [], None
        for part in self.encoders:
            rows, chunks, tokens = ids[part].shape
            found = encoders[part](ids[part].flatten(0, 1), output_hidden_states=True)
            hidden = found.hidden_states[-2]
            sequences.append(hidden.reshape(rows, chunks * tokens, hidden.shape[-1]))
            if part == "text_encoder_2":
                pooled = found.text_embeds.reshape(rows, chunks, -1)[:, 0]
        return Conditions(torch.cat(sequences, dim=-1), pooled)

    def encode_pixels(self, vae: Any, pixels: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """The VAE's posterior times its scaling factor; large images in tiles."""
        if max(pixels.shape[-2:]) > _TILED_ABOVE_PX:
            vae.enable_tiling()
        return super().encode_pixels(vae, pixels)

    def decode(self, vae: Any, latents: "torch.Tensor") -> "torch.Tensor":
        """The VAE's images, in float32 whatever else is computed in: in float16 this VAE overflows."""
        import torch

        with torch.autocast(latents.device.type, enabled=False):
            return super().decode(vae, latents.float())

    def picture_numbers(
        self, framings: Sequence[Framing], width: int, height: int, *, mirrored: bool = False
    ) -> "torch.Tensor":
        """Original size, crop and target size, float32 [n, 6]: bfloat16 cannot tell 1365 from 1368."""
        import torch

        rows = [framing.numbers(width, height, mirrored=mirrored) for framing in framings]
        return torch.tensor(rows, dtype=torch.float32)

    def load_objective(self, folder: Path, spec: ModelSpec) -> Diffusion:
        """Diffusion with the model's own betas; they end in pure noise only where the model was trained so."""
        from diffusers import DDPMScheduler

        zero = spec.zero_terminal_snr
        return Diffusion(load_scheduler(DDPMScheduler, folder, spec, rescale_betas_zero_snr=zero))

    def load_sampler(self, folder: Path, spec: ModelSpec) -> Any:
        """Euler's method; where the schedule ends in pure noise it begins there."""
        from diffusers import EulerDiscreteScheduler

        if spec.zero_terminal_snr:
            return super().load_sampler(folder, spec)
        return load_scheduler(EulerDiscreteScheduler, folder, spec, rescale_betas_zero_snr=False)

    def predict(
        self,
        denoiser: Any,
        noisy: "torch.Tensor",
        times: "torch.Tensor",
        text: Conditions,
        pictures: "torch.Tensor | None" = None,
    ) -> "torch.Tensor":
        """The U-Net's prediction; it is told the pooled text and each image's size and crop as well."""
        added = {"text_embeds": text.pooled, "time_ids": pictures}
        return denoiser(noisy, times, text.sequence, added_cond_kwargs=added).sample

    def blank_conditions(
        self, denoiser: Any, rows: int, encoders: Mapping[str, Any]
    ) -> "tuple[Conditions, torch.Tensor | None]":
        """One chunk of text, and the numbers of so many images."""
        import torch

        config = denoiser.config
        told = torch.empty(rows, _SIZE_NUMBERS)
        if encoders:
            ids = torch.zeros(rows, 1, _CHUNK + 2, dtype=torch.int64)
            return self.encode(encoders, dict.fromkeys(encoders, ids)), told
        pooled = config.projection_class_embeddings_input_dim - _SIZE_NUMBERS * config.addition_time_embed_dim
        sequence = torch.empty(rows, _CHUNK + 2, config.cross_attention_dim)
        return Conditions(sequence, torch.empty(rows, pooled)), told

    def lora_metadata(self, spec: ModelSpec) -> dict[str, str]:
        """What tells readers that the base predicts velocity; the words for the family are the same."""
        if spec.prediction_type != "v_prediction":
            return {}
        zero = {"ss_zero_terminal_snr": "True"} if spec.zero_terminal_snr else {}
        return {"ss_v_parameterization": "True", **zero}
