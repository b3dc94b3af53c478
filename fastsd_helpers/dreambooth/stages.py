"""What each stage trains, and how one optimizer step of it is taken.

A family or method that trains something else adds a row to STAGES or a job here; the loop in engine.py stays as it is.
"""

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

from fastsd_helpers.dreambooth.base_model import BaseModel, plain_names
from fastsd_helpers.dreambooth.cache import Latents, encode_images, encode_prompts, tokenize
from fastsd_helpers.dreambooth.chance import draw_step
from fastsd_helpers.dreambooth.denoising import HeldOut, held_out_loss, make_held_out, training_loss
from fastsd_helpers.dreambooth.optimizers import build_optimizer, pack_optimizer, unpack_optimizer
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.runtime import Device

if TYPE_CHECKING:
    import torch

    from fastsd_helpers.dreambooth.dataset import Dataset
    from fastsd_helpers.dreambooth.resume import Generation

__all__ = ["STAGES", "Job", "Stage", "Studio", "open_stage"]


@dataclass(frozen=True)
class Stage:
    """One stage: its name is also the role of its weights in a checkpoint."""

    name: str


STAGES = (Stage("text_encoder"), Stage("unet"))


class Studio:
    """What both stages share: base model, device, precision, caches, and what was trained so far."""

    def __init__(self, base: BaseModel, config: DreamBoothConfig, device: Device) -> None:
        import torch

        self.base, self.config = base, config
        self.device = torch.device(device.kind)
        self.dtype = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[config.precision]
        self.schedule = base.load_noise_schedule()
        self.tokenizer = base.load_tokenizer()
        self.trained: dict[str, dict[str, torch.Tensor] | None] = {stage.name: None for stage in STAGES}
        self.latents: Latents
        self.held_out: HeldOut
        self.held_out_label = ""
        self.prompts: list[str] = []
        self.prompt_of: list[int] = []  # training picture -> its prompt's index
        if config.deterministic:
            torch.use_deterministic_algorithms(True)

    def count_of(self, part: str) -> int:
        """Number of values in the U-Net or the text encoder, from the model's own configuration."""
        import torch

        with torch.device("meta"):
            module = self._build_empty(part)
        return sum(parameter.numel() for parameter in module.parameters())

    def _build_empty(self, part: str) -> Any:
        if part == "unet":
            from diffusers import UNet2DConditionModel

            return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(self.base.folder, subfolder=part))
        from transformers import CLIPTextConfig, CLIPTextModel

        return CLIPTextModel(CLIPTextConfig.from_pretrained(self.base.folder, subfolder=part))

    def autocast(self) -> contextlib.AbstractContextManager:
        """Half-precision arithmetic where the settings ask for it."""
        import torch

        return torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()

    def fill_caches(self, dataset: "Dataset") -> None:
        """Encode every picture once, and fix the held-out noise; the VAE is freed afterwards."""
        config = self.config
        vae = self.base.load_vae().to(self.device)
        self.latents = encode_images(vae, dataset.train, config.resolution, device=self.device, flip=config.flip)
        judged = dataset.held_out or dataset.train
        self.held_out_label = "pictures never trained on" if dataset.held_out else "training pictures, reserved noise"
        latents = self.latents
        if dataset.held_out:
            latents = encode_images(vae, dataset.held_out, config.resolution, device=self.device)
        self.prompts = sorted({image.prompt for image in (*dataset.train, *dataset.held_out)})
        place = {prompt: index for index, prompt in enumerate(self.prompts)}
        self.prompt_of = [place[image.prompt] for image in dataset.train]
        self.held_out = make_held_out(
            latents, [place[image.prompt] for image in judged], seed=config.seed, label=self.held_out_label
        )

    def empty_text(self) -> "torch.Tensor":
        """The embedding of the empty prompt, float32 [1, 77, width]: what guidance leads away from."""
        return encode_prompts(self.load_text_encoder(), self.tokenizer, [""], device=self.device)

    def load_text_encoder(self) -> Any:
        """The text encoder as it is now: trained when stage 1 is done, else the base model's."""
        return self._with_trained(self.base.load_text_encoder(), "text_encoder").to(self.device)

    def load_unet(self) -> Any:
        """The U-Net as it is now, on the device."""
        return self._with_trained(self.base.load_unet(), "unet").to(self.device)

    def _with_trained(self, module: Any, part: str) -> Any:
        if self.trained[part] is not None:
            put_tensors(module, self.trained[part])
        # Plain attention holds a whole attention map: fine for small pictures, too much for large ones.
        if self.device.type == "cpu" and (self.config.resolution // 8) ** 2 <= 1024:
            _suit_cpu(module)
        return module

    def keep(self, stage: Stage, job: "Job") -> None:
        """Remember a finished stage's weights for the next stage and for the finished file."""
        self.trained[stage.name] = {name: tensor.cpu() for name, tensor in job.weights().items()}


def put_tensors(module: Any, tensors: "dict[str, torch.Tensor]") -> None:
    """Load weights saved under plain names, whatever spelling this module's library version has."""
    own = module.state_dict()
    spelling = {name.removeprefix("text_model."): name for name in own}
    module.load_state_dict({spelling.get(name, name): tensor for name, tensor in tensors.items()})


def _suit_cpu(module: Any) -> None:
    """Choose the forms of attention and GroupNorm that are fast in training on a CPU.

    The fused attention's backward pass takes several times the plain one's in bf16, and GroupNorm's takes 5 to 20 times
    as long on the channels-last values that bf16 convolutions hand over.
    """
    import torch
    from torch.nn import functional

    def group_norm(norm: Any, x: "torch.Tensor") -> "torch.Tensor":
        return functional.group_norm(x.contiguous(), norm.num_groups, norm.weight, norm.bias, norm.eps)

    if hasattr(module, "set_attn_processor"):
        from diffusers.models.attention_processor import AttnProcessor

        module.set_attn_processor(AttnProcessor())
    elif hasattr(module, "set_attn_implementation"):
        module.set_attn_implementation("eager")
    for part in module.modules():
        if isinstance(part, torch.nn.GroupNorm):
            part.forward = MethodType(group_norm, part)


class Job(ABC):
    """One stage under way: the trained module, its optimizer, and the step."""

    stage: str
    unet: Any

    def __init__(self, studio: Studio, module: Any, lr: float) -> None:
        import torch

        self.studio, self.module = studio, module
        named = [(name, parameter) for name, parameter in module.named_parameters()]
        self.names = [name.removeprefix("text_model.") for name, _ in named]
        self.parameters = [parameter.requires_grad_(True) for _, parameter in named]
        self.optimizer = build_optimizer(studio.config.optimizer, self.parameters, lr)
        self.scaler = torch.amp.GradScaler(studio.device.type, enabled=studio.dtype is torch.float16)
        if studio.config.gradient_checkpointing:
            turn_on = getattr(module, "enable_gradient_checkpointing", None) or module.gradient_checkpointing_enable
            turn_on()
            module.train()  # both libraries checkpoint only in training mode; these models have no dropout

    @abstractmethod
    def text_for(self, prompts: list[int]) -> "torch.Tensor":
        """Text embeddings [n, 77, width] of prompts by index, on the device."""

    def take_step(self, step: int, lr: float) -> float:
        """One optimizer step; returns its mean loss."""
        import torch

        studio, config = self.studio, self.studio.config
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = 0.0
        for part in range(config.accumulation):
            draw = draw_step(
                config.seed,
                self.stage,
                step,
                part,
                parts=config.accumulation,
                batch_size=config.batch_size,
                images=len(studio.prompt_of),
                latent_shape=tuple(studio.latents.mean.shape[1:]),
                timesteps=studio.schedule.config.num_train_timesteps,
                flip=config.flip,
            )
            latents = studio.latents.draw(draw.images, draw.flips, draw.posterior_noise).to(studio.device)
            noise, timesteps = draw.noise.to(studio.device), draw.timesteps.to(studio.device)
            with studio.autocast():
                text = self.text_for([studio.prompt_of[image] for image in draw.images])
                loss = training_loss(self.unet, studio.schedule, latents, noise, timesteps, text)
            self.scaler.scale(loss / config.accumulation).backward()
            total += loss.item() / config.accumulation
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def held_out_loss(self) -> float:
        """The held-out loss of the model as it is now."""
        import torch

        studio = self.studio
        with studio.autocast(), torch.no_grad():
            text = self.text_for(list(range(len(studio.prompts)))).float()
            return held_out_loss(self.unet, studio.schedule, studio.held_out, text, device=studio.device)

    def weights(self) -> "dict[str, torch.Tensor]":
        """The trained module's tensors under plain names."""
        return plain_names(self.module.state_dict())

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """All that a resumed run needs: tensors by role, and JSON-able values."""
        optimizer, rest = pack_optimizer(self.optimizer, self.names)
        tensors = {self.stage: self.weights(), "optimizer": optimizer}
        return tensors, {"optimizer": rest, "scaler": self.scaler.state_dict()}

    def restore(self, generation: "Generation") -> None:
        """Go on from a checkpoint."""
        put_tensors(self.module, generation.load(self.stage))
        unpack_optimizer(self.optimizer, self.names, generation.load("optimizer"), generation.record["optimizer"])
        if generation.record["scaler"]:
            self.scaler.load_state_dict(generation.record["scaler"])


class TextEncoderJob(Job):
    """Stage 1: the text encoder learns, through a U-Net that stays as it is."""

    stage = "text_encoder"

    def __init__(self, studio: Studio) -> None:
        super().__init__(studio, studio.load_text_encoder(), studio.config.text_encoder_lr)
        self.unet = studio.load_unet()
        self.ids = tokenize(studio.tokenizer, studio.prompts).to(studio.device)

    def text_for(self, prompts: list[int]) -> "torch.Tensor":
        return self.module(self.ids[prompts]).last_hidden_state


class UnetJob(Job):
    """Stage 2: the U-Net learns on text embeddings that were computed once; the text encoder is gone from memory."""

    stage = "unet"

    def __init__(self, studio: Studio) -> None:
        text_encoder = studio.load_text_encoder()
        self.text = encode_prompts(text_encoder, studio.tokenizer, studio.prompts, device=studio.device)
        del text_encoder
        super().__init__(studio, studio.load_unet(), studio.config.unet_lr)
        self.unet = self.module

    def text_for(self, prompts: list[int]) -> "torch.Tensor":
        return self.text[prompts].to(self.studio.device)


def open_stage(stage: Stage, studio: Studio, resumed: "Generation | None") -> Job:
    """Set a stage up at its beginning, or as the checkpoint `resumed` left it."""
    job = TextEncoderJob(studio) if stage.name == "text_encoder" else UnetJob(studio)
    if resumed is not None:
        job.restore(resumed)
    return job
