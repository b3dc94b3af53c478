"""What the training of a model family differs in, as one small interface.

Networks are named by their Diffusers part. A stage trains one or more of them: `unet` the denoiser, whatever it is
called, and `text_encoder` those text encoders that can learn. With several the weights of a stage are named
`PART.NAME`, with one `NAME`.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fastsd_helpers.dreambooth.families.conditions import Conditions
from fastsd_helpers.dreambooth.families.framing import Framing
from fastsd_helpers.registry import ModelSpec

if TYPE_CHECKING:
    import torch

__all__ = ["Counts", "Family", "Ids", "Objective", "PublishedStep"]

Ids = Mapping[str, Any]  # text encoder's part -> token ids int64 [n, ...]


class Objective(Protocol):
    """What the denoiser learns: noise at a time, the target of its prediction, and how much a time counts."""

    @property
    def held_out_times(self) -> Sequence[float]:
        """The times at which every held-out picture is judged."""

    def draw_times(self, count: int, generator: "torch.Generator") -> "torch.Tensor":
        """The times of so many rows."""

    def add_noise(self, latents: "torch.Tensor", noise: "torch.Tensor", times: "torch.Tensor") -> "torch.Tensor":
        """The latents at these times."""

    def target(self, latents: "torch.Tensor", noise: "torch.Tensor", times: "torch.Tensor") -> "torch.Tensor":
        """What should be predicted."""

    def weights(self, times: "torch.Tensor", gamma: float) -> "torch.Tensor":
        """Each row's weight in the loss, where `min_snr` is on."""


@dataclass(frozen=True)
class Counts:
    """How many values a model's parts have, and a LoRA of rank 1 on the layers that are trained."""

    unet: int
    text_encoder: int
    vae: int
    lora_unet: int
    lora_text_encoder: int

    def trained(self, method: str, rank: int) -> dict[str, int]:
        """Stage -> number of values that are trained."""
        return self.lora(rank) if method == "lora" else {"text_encoder": self.text_encoder, "unet": self.unet}

    def lora(self, rank: int) -> dict[str, int]:
        """Stage -> number of values of a LoRA of this rank."""
        return {"text_encoder": rank * self.lora_text_encoder, "unet": rank * self.lora_unet}

    def export_bytes(self, method: str, rank: int, stages: Collection[str]) -> int:
        """Size of the finished float16 file; of a LoRA those stages alone are in it that are trained."""
        sizes = self.trained(method, rank)
        values = sum(sizes[stage] for stage in stages) if method == "lora" else sum(sizes.values()) + self.vae
        return 2 * values + 2**20


@dataclass(frozen=True)
class PublishedStep:
    """What others have published of a step of the denoiser: a batch of one image, half precision.

    Attributes:
        gpu: a word of its name.
        px: resolution.
        checkpointed: with gradient checkpointing.
        seconds: of a step.
        source: who says so.
    """

    gpu: str
    px: int
    checkpointed: bool
    seconds: float
    source: str


class Family(ABC):
    """How the models of a family are trained.

    Attributes:
        parts: network's part -> library and class; the VAE is among them.
        denoiser: its part.
        encoders: text encoders' parts -> their tokenizers' folders.
        trained_encoders: those that can learn.
        channels: of the latents.
        half_base: whether the weights that a LoRA is added to are kept in the compute dtype; else in float32.
        large: whether AdamW's state for all weights is too much for most GPUs.
        most_tokens: tokens of a prompt that are read, start and end with them.
        published: choice of LoRA layers -> the values of the published model.
        steps_of_others: how long a step took others.
        forward_teraflops: resolution -> of a forward pass of one image, counted on the published denoiser's shapes.
    """

    parts: ClassVar[Mapping[str, tuple[str, str]]]
    denoiser: ClassVar[str] = "unet"
    encoders: ClassVar[Mapping[str, str]]
    trained_encoders: ClassVar[tuple[str, ...]]
    channels: ClassVar[int] = 4
    half_base: ClassVar[bool] = False
    large: ClassVar[bool] = False
    most_tokens: ClassVar[int] = 77
    # Per part and choice: the ends of the names of the layers that a LoRA is added to.
    lora_layers: ClassVar[Mapping[str, Mapping[str, tuple[str, ...]]]]
    published: ClassVar[Mapping[str, Counts]]
    steps_of_others: ClassVar[tuple[PublishedStep, ...]] = ()
    forward_teraflops: ClassVar[Mapping[int, float]] = {}

    def parts_of(self, stage: str) -> tuple[str, ...]:
        """The networks that a stage trains."""
        return self.trained_encoders if stage == "text_encoder" else (self.denoiser,)

    # -------------------------------------------------------------------------------------------------- text

    @abstractmethod
    def tokenize(self, tokenizers: Mapping[str, Any], prompts: list[str]) -> Ids:
        """Token ids of prompts: text encoder's part -> int64 [n, ...]; `tokenizers` are by part as well."""

    @abstractmethod
    def encode(self, encoders: Mapping[str, Any], ids: Ids) -> Conditions:
        """The text of some rows, with gradients where an encoder learns."""

    # ------------------------------------------------------------------------------------------------- images

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Channels, height and width of the latents of images of this size."""
        return (self.channels, height // 8, width // 8)

    @abstractmethod
    def encode_pixels(self, vae: Any, pixels: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """Mean and deviation of the latents [n, channels, h, w] of images [n, 3, h, w] in -1..1."""

    @abstractmethod
    def decode(self, vae: Any, latents: "torch.Tensor") -> "torch.Tensor":
        """Images [n, 3, h, w] of latents."""

    def picture_numbers(
        self, framings: Sequence[Framing], width: int, height: int, *, mirrored: bool = False
    ) -> "torch.Tensor | None":
        """What the denoiser is told about each image, float32 [n, ...]; None where it is told nothing."""
        return None

    # -------------------------------------------------------------------------------------------------- model

    @abstractmethod
    def load_objective(self, folder: Path, spec: ModelSpec) -> Objective:
        """What the model at `folder` learns."""

    @abstractmethod
    def load_sampler(self, folder: Path, spec: ModelSpec) -> Any:
        """The sampler that images are generated with."""

    def guidance_rescale(self, spec: ModelSpec) -> float:
        """How much of the guided prediction's contrast is taken back (Lin et al. 2023); 0 = nothing."""
        return 0.0

    @abstractmethod
    def predict(
        self,
        denoiser: Any,
        noisy: "torch.Tensor",
        times: "torch.Tensor",
        text: Conditions,
        pictures: "torch.Tensor | None" = None,
    ) -> "torch.Tensor":
        """The denoiser's prediction, of the shape of `noisy`."""

    @abstractmethod
    def blank_conditions(
        self, denoiser: Any, rows: int, encoders: Mapping[str, Any]
    ) -> "tuple[Conditions, torch.Tensor | None]":
        """Conditions of the right shapes on the current device, for memory figures; by the encoders if they learn."""

    # --------------------------------------------------------------------------------------------------- LoRA

    def takes_lora(self, part: str, name: str, targets: str) -> bool:
        """Whether a layer has matrices of its own with this choice of layers."""
        return f".{name}".endswith(tuple(f".{end}" for end in self.lora_layers[part][targets]))

    def lora_metadata(self, spec: ModelSpec) -> dict[str, str]:
        """What a LoRA file says besides what is said of every family."""
        return {}
