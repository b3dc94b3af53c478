"""Stable Diffusion 1.5 and 2.1: one CLIP text encoder, a U-Net, noise or velocity."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fastsd_helpers.checkpoints.names.families import architecture_of
from fastsd_helpers.downloads import read_json
from fastsd_helpers.dreambooth.families.conditions import Conditions
from fastsd_helpers.dreambooth.families.diffusion import Diffusion
from fastsd_helpers.dreambooth.families.family import Counts, Family, Ids, PublishedStep
from fastsd_helpers.errors import ModelError
from fastsd_helpers.registry import ModelSpec

if TYPE_CHECKING:
    import torch

__all__ = ["CLIP_LAYERS", "SIMPLE_TUNER", "UNET_LAYERS", "StableDiffusion1", "StableDiffusion2", "load_scheduler"]

# `attention` as in diffusers' scripts; `all linears` as in kohya's: every linear layer of the transformer blocks.
_UNET = ("to_q", "to_k", "to_v", "to_out.0")
_CLIP = ("q_proj", "k_proj", "v_proj", "out_proj")
CLIP_LAYERS = {"attention": _CLIP, "all linears": (*_CLIP, "mlp.fc1", "mlp.fc2")}
UNET_LAYERS = {
    "attention": _UNET,
    "all linears": (*_UNET, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
}


SIMPLE_TUNER = "SimpleTuner's SEGMENTED_CHECKPOINTING.md"


class StableDiffusion1(Family):
    """Stable Diffusion 1.5."""

    parts: ClassVar[Mapping[str, tuple[str, str]]] = {
        "unet": ("diffusers", "UNet2DConditionModel"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer"}
    trained_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    lora_layers: ClassVar[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
        "unet": UNET_LAYERS,
        "text_encoder": CLIP_LAYERS,
    }
    published: ClassVar[Mapping[str, Counts]] = {
        "attention": Counts(859_520_964, 123_060_480, 83_653_863, 199_296, 73_728),
        "all linears": Counts(859_520_964, 123_060_480, 83_653_863, 423_936, 165_888),
    }
    # The T4's of all weights with 8-bit AdamW (in steps a second there), the others of a LoKr.
    steps_of_others: ClassVar[tuple[PublishedStep, ...]] = (
        PublishedStep("T4", 512, True, 1 / 0.93, "ShivamShrirao's DreamBooth README"),
        PublishedStep("T4", 512, False, 1 / 1.14, "ShivamShrirao's DreamBooth README"),
        PublishedStep("H100", 512, True, 0.305, SIMPLE_TUNER),
        PublishedStep("H100", 512, False, 0.181, SIMPLE_TUNER),
        PublishedStep("L40S", 512, False, 0.176, SIMPLE_TUNER),
    )
    forward_teraflops: ClassVar[Mapping[int, float]] = {512: 0.803, 768: 2.148}

    def tokenize(self, tokenizers: Mapping[str, Any], prompts: list[str]) -> Ids:
        """Ids int64 [n, 77], padded and cut as Stable Diffusion expects."""
        settings = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
        return {part: tokenizer(prompts, **settings).input_ids for part, tokenizer in tokenizers.items()}

    def encode(self, encoders: Mapping[str, Any], ids: Ids) -> Conditions:
        """The text encoder's last layer, [n, 77, width]."""
        return Conditions(encoders["text_encoder"](ids["text_encoder"]).last_hidden_state)

    def encode_pixels(self, vae: Any, pixels: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """The VAE's posterior times its scaling factor."""
        posterior = vae.encode(pixels).latent_dist
        factor = vae.config.scaling_factor
        return posterior.mean * factor, posterior.std * factor

    def decode(self, vae: Any, latents: "torch.Tensor") -> "torch.Tensor":
        """The VAE's images."""
        return vae.decode(latents / vae.config.scaling_factor).sample

    def load_objective(self, folder: Path, spec: ModelSpec) -> Diffusion:
        """Diffusion with the model's own betas.

        What the network predicts is the registry's word: a copy of a v-prediction model whose scheduler file does not
        say so would train without an error and learn noise.
        """
        from diffusers import DDPMScheduler

        return Diffusion(load_scheduler(DDPMScheduler, folder, spec))

    def load_sampler(self, folder: Path, spec: ModelSpec) -> Any:
        """The sampler that the model's folder names; where the schedule ends in pure noise, one that begins there."""
        import diffusers

        if spec.zero_terminal_snr:
            settings = {"timestep_spacing": "trailing"}
            return load_scheduler(diffusers.EulerDiscreteScheduler, folder, spec, **settings)
        name = str(read_json(folder / "scheduler", "scheduler_config.json").get("_class_name"))
        kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
        if kind is None:
            raise ModelError(
                f"{folder / 'scheduler'} names {name[:80]!r}, a scheduler that this diffusers version lacks.",
                "Update diffusers, or choose another model.",
            )
        return load_scheduler(kind, folder, spec)

    def guidance_rescale(self, spec: ModelSpec) -> float:
        """0.7 where the schedule ends in pure noise, as its paper advises."""
        return 0.7 if spec.zero_terminal_snr else 0.0

    def predict(
        self,
        denoiser: Any,
        noisy: "torch.Tensor",
        times: "torch.Tensor",
        text: Conditions,
        pictures: "torch.Tensor | None" = None,
    ) -> "torch.Tensor":
        """The U-Net's prediction."""
        return denoiser(noisy, times, text.sequence).sample

    def blank_conditions(
        self, denoiser: Any, rows: int, encoders: Mapping[str, Any]
    ) -> "tuple[Conditions, torch.Tensor | None]":
        """One chunk of text."""
        import torch

        if encoders:
            return self.encode(encoders, {"text_encoder": torch.zeros(rows, 77, dtype=torch.int64)}), None
        return Conditions(torch.empty(rows, 77, denoiser.config.cross_attention_dim)), None

    def lora_metadata(self, spec: ModelSpec) -> dict[str, str]:
        """The words for velocity, where the model predicts that."""
        if spec.prediction_type != "v_prediction":
            return {}
        return {"ss_base_model_version": "sd_v1_v"}


class StableDiffusion2(StableDiffusion1):
    """Stable Diffusion 2.1: the same with OpenCLIP's text encoder."""

    published: ClassVar[Mapping[str, Counts]] = {
        "attention": Counts(865_910_724, 340_387_840, 83_653_863, 207_488, 188_416),
        "all linears": Counts(865_910_724, 340_387_840, 83_653_863, 432_128, 423_936),
    }
    steps_of_others: ClassVar[tuple[PublishedStep, ...]] = ()

    def lora_metadata(self, spec: ModelSpec) -> dict[str, str]:
        """The words for what the model predicts."""
        velocity = {"ss_base_model_version": "sd_v2_v"} if spec.prediction_type == "v_prediction" else {}
        return {**velocity, "modelspec.architecture": f"{architecture_of('sd21', spec.prediction_type)}/lora"}


def load_scheduler(kind: Any, folder: Path, spec: ModelSpec, **settings: Any) -> Any:
    """A scheduler of diffusers with the betas of the folder's; what is predicted is the registry's word."""
    if spec.zero_terminal_snr:
        settings["rescale_betas_zero_snr"] = True
    return kind.from_pretrained(
        folder, subfolder="scheduler", local_files_only=True, prediction_type=spec.prediction_type, **settings
    )
