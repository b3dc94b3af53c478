"""The base model of a run: its Diffusers folder, and its parts loaded one by one when they are needed.

Families differ in how they read a prompt and in what the U-Net predicts; the training loop asks here and does not know.
"""

from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from fastsd_helpers.downloads import model_hash, read_json, variant_of
from fastsd_helpers.dreambooth.training.single_files import make_base
from fastsd_helpers.errors import ModelError, needs_package
from fastsd_helpers.model_lookup import base_model, find_folder, require_inert
from fastsd_helpers.registry import ModelSpec, require_trainable, require_trainable_key, spec_of

if TYPE_CHECKING:
    import torch

__all__ = ["BaseModel", "checkpoint_gradients", "plain_names", "put_tensors", "suit_cpu"]


def plain_names(state: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """A CLIP text encoder's tensors without the `text_model.` that transformers before 5.6 puts before each name.

    So a run that was begun under one version goes on under the other.
    """
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


@dataclass(frozen=True)
class BaseModel:
    """A Diffusers folder of a family that can be trained."""

    ref: str  # what the user named: key, Hub id, folder, single file or link
    folder: Path
    spec: ModelSpec

    @classmethod
    def fetch(cls, ref: str) -> "BaseModel":
        """Find or download the model; of a single file or a link to one a Diffusers folder is made, once.

        Raises:
            WrongFamily: it cannot be trained; nothing large was fetched.
            ModelNotFound: it is not there.
            ModelError: it is not whole.
            DownloadError: the link gave no model.
            CheckpointError: the file cannot be read safely.
        """
        folder = find_folder(ref, base_model(require_trainable_key, require_trainable), convert=make_base)
        return cls(ref, folder, spec_of(ref, folder))

    def sha256(self) -> str:
        """A hash over the weights, to tell whether a session goes on from the same model."""
        return model_hash(self.folder)

    def _load(self, kind: Any, part: str) -> Any:
        import torch
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        require_inert(self.folder / part)
        # Their bars for every part would bury the lines that matter; ours tell where the run is.
        transformers_logging.disable_progress_bar()
        diffusers_logging.disable_progress_bar()
        try:
            module = kind.from_pretrained(
                self.folder,
                subfolder=part,
                variant=variant_of(self.folder, part),
                local_files_only=True,
                torch_dtype=torch.float32,
            )
        except (OSError, ValueError, RuntimeError, KeyError) as err:
            raise ModelError(
                f"The {part} of {self.ref} cannot be loaded: {str(err).splitlines()[0]}",
                "The folder may be damaged: download the model again, or choose another one.",
            ) from err
        return module.requires_grad_(False).eval()

    def load(self, part: str) -> Any:
        """The U-Net or the text encoder, by its name."""
        return self.load_unet() if part == "unet" else self.load_text_encoder()

    def load_unet(self) -> Any:
        """The U-Net in float32, frozen: latents [batch, 4, h/8, w/8] and text [batch, 77, width] to the prediction."""
        return self._load(_diffusers().UNet2DConditionModel, "unet")

    def load_vae(self) -> Any:
        """The VAE in float32, frozen: images [batch, 3, h, w] in -1..1 to latents and back."""
        return self._load(_diffusers().AutoencoderKL, "vae")

    def load_text_encoder(self) -> Any:
        """The CLIP text encoder in float32, frozen: token ids [batch, 77] to [batch, 77, width]."""
        from transformers import CLIPTextModel

        return self._load(CLIPTextModel, "text_encoder")

    def load_tokenizer(self) -> Any:
        """The CLIP tokenizer; 77 tokens at most."""
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)

    def load_noise_schedule(self) -> Any:
        """The training noise schedule (a DDPMScheduler), with the model's own betas and prediction type.

        What the network predicts is the registry's word: a copy of a v-prediction model whose scheduler file does not
        say so would train without an error and learn noise.
        """
        return self._load_scheduler(_diffusers().DDPMScheduler)

    def _load_scheduler(self, kind: Any) -> Any:
        return kind.from_pretrained(
            self.folder, subfolder="scheduler", local_files_only=True, prediction_type=self.spec.prediction_type
        )

    def load_sampler(self) -> Any:
        """The sampler that the model's folder names."""
        import diffusers

        name = str(read_json(self.folder / "scheduler", "scheduler_config.json").get("_class_name"))
        kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
        if kind is None:
            raise ModelError(
                f"{self.folder / 'scheduler'} names {name[:80]!r}, a scheduler that this diffusers version lacks.",
                "Update diffusers, or choose another model.",
            )
        return self._load_scheduler(kind)


def _diffusers() -> Any:
    with needs_package("Training", "Run: fastsd install dreambooth"):
        import diffusers
    return diffusers


def put_tensors(module: Any, tensors: "dict[str, torch.Tensor]") -> None:
    """Load weights saved under plain names, whatever spelling this module's library version has."""
    own = module.state_dict()
    spelling = {name.removeprefix("text_model."): name for name in own}
    module.load_state_dict({spelling.get(name, name): tensor for name, tensor in tensors.items()})


def checkpoint_gradients(module: Any) -> None:
    """Keep few of the values of the forward pass and compute the others again in the backward pass."""
    if hasattr(module, "enable_gradient_checkpointing"):
        module.enable_gradient_checkpointing()
    else:
        # The older form finds no gradient where a frozen layer comes first, as it does with LoRA.
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module.train()  # both libraries checkpoint only in training mode; these models have no dropout


def suit_cpu(module: Any) -> None:
    """Choose the forms of attention and GroupNorm that are fast in training in bf16 on a CPU.

    The fused attention's backward pass takes several times the plain one's in bf16, and GroupNorm's takes 5 to 20 times
    as long on the channels-last values that bf16 convolutions hand over. In fp32 neither is so.
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
