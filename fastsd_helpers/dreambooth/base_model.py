"""The base model of a run: its Diffusers folder, and its parts loaded one by one when they are needed.

Families differ in how they read a prompt and in what the U-Net predicts; the training loop asks here and does not know.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.downloads import model_hash, read_json, variant_of
from fastsd_helpers.dreambooth.single_files import make_base
from fastsd_helpers.errors import ModelError, needs_package
from fastsd_helpers.model_lookup import base_model, find_folder, require_inert
from fastsd_helpers.registry import ModelSpec, require_trainable, require_trainable_key, spec_of

if TYPE_CHECKING:
    import torch

__all__ = ["BaseModel", "plain_names"]


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
                f"{self.folder / 'scheduler'} names {name[:80]!r}, which is no scheduler of this diffusers.",
                "Update diffusers, or choose another model.",
            )
        return self._load_scheduler(kind)


def _diffusers() -> Any:
    with needs_package("Training", "Run: fastsd install dreambooth"):
        import diffusers
    return diffusers
