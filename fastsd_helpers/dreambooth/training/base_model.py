"""The base model of a run: its Diffusers folder, and its parts loaded one by one when they are needed."""

import importlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

from fastsd_helpers.device import give_back_freed_memory
from fastsd_helpers.downloads import model_hash, variant_of
from fastsd_helpers.dreambooth.families import Family, Objective, family_named
from fastsd_helpers.dreambooth.settings import ResolvedConfig
from fastsd_helpers.dreambooth.training.optimizers import weight_bytes
from fastsd_helpers.dreambooth.training.single_files import make_base
from fastsd_helpers.errors import ModelError, SettingsError, needs_package
from fastsd_helpers.model_lookup import base_model, find_folder, require_inert
from fastsd_helpers.registry import ModelSpec, require_trainable, require_trainable_key, spec_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "BaseModel",
    "checkpoint_gradients",
    "class_of",
    "dtypes_of",
    "plain_name",
    "plain_names",
    "put_tensors",
    "suit_cpu",
    "suits_cpu",
]

_MANY_TOKENS = 1024  # from there on plain attention is not faster in training, and its maps grow large


def plain_names(state: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """A CLIP text encoder's tensors without the `text_model.` that transformers before 5.6 puts before each name.

    So a run that was begun under one version goes on under the other.
    """
    return {plain_name(name): tensor for name, tensor in state.items()}


def plain_name(name: str) -> str:
    """One such name; of a stage with several networks the network's part stays before it."""
    return re.sub(r"^(\w+\.)?text_model\.", r"\1", name)


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

    def predicting(self, prediction_type: str, zsnr: bool | None, *, begun: bool = False) -> "BaseModel":
        """The same model, with what the user says of it where the model says nothing.

        Args:
            prediction_type: auto, epsilon or v_prediction.
            zsnr: nothing, where the user says nothing.
            begun: a run was begun with these settings; earlier versions did not ask, and took noise.

        Raises:
            SettingsError: it cannot be told what the model predicts, or something else is said of it than it says.
        """
        spec, says = self.spec, self.spec.prediction_type
        named = says if prediction_type == "auto" else prediction_type
        if named == "unknown" and begun:
            named = "epsilon"
        if named == "unknown":
            raise SettingsError(
                f"Nothing in {self.ref} says whether the model predicts noise or velocity; trained as the wrong one it "
                "would make empty images, without an error.",
                "Look it up where the model is from: most predict noise (--prediction-type epsilon), those called "
                "V-Pred or vpred velocity (--prediction-type v_prediction).",
            )
        if begun and says not in ("unknown", named):
            raise SettingsError(
                f"This session's run was started with prediction_type {named}, but {self.ref} says {says}.",
                "Specify with --base-model the model as it was then, or start again from step 0 with --restart; "
                "nothing saved is lost.",
            )
        if says not in ("unknown", named):
            raise SettingsError(
                f"prediction_type (--prediction-type) is {named}, but {self.ref} says {says}.",
                "Leave it out. Where the model is wrong about itself, correct prediction_type in the "
                "scheduler/scheduler_config.json of its Diffusers folder (of a file, fastsd convert makes one).",
            )
        zero = spec.zero_terminal_snr if zsnr is None else zsnr
        if zero and named != "v_prediction":
            raise SettingsError(
                f"zsnr (--zsnr) ends the noise schedule in pure noise, and {self.ref} predicts noise: of that nothing "
                "can be learned there.",
                "Leave out zsnr; it is for models that predict velocity.",
            )
        return replace(self, spec=replace(spec, prediction_type=cast(Any, named), zero_terminal_snr=zero))

    def sha256(self) -> str:
        """A hash over the weights, to tell whether a session goes on from the same model."""
        return model_hash(self.folder)

    @property
    def family(self) -> Family:
        """How it is trained."""
        return family_named(self.spec.family)

    def load(self, part: str, dtype: Any = None) -> Any:
        """A network, frozen, by its part: in float32, or in the torch dtype that is given.

        Raises:
            ModelError: it cannot be loaded.
        """
        import torch

        require_inert(self.folder / part)
        kind = class_of(self.family, part)
        _silence_bars()
        give_back_freed_memory()  # of the networks before it
        try:
            module = kind.from_pretrained(
                self.folder,
                subfolder=part,
                variant=variant_of(self.folder, part),
                local_files_only=True,
                torch_dtype=dtype or torch.float32,
            )
        except (OSError, ValueError, RuntimeError, KeyError) as err:
            raise ModelError(
                f"The {part} of {self.ref} cannot be loaded: {str(err).splitlines()[0]}",
                "The folder may be damaged: download the model again, or choose another one.",
            ) from err
        return module.requires_grad_(False).eval()

    def build_empty(self, part: str) -> Any:
        """A network without weights, on the `meta` device."""
        import torch

        # Imported first: what a library imports along with a class may calculate, as an older torchao does.
        kind = class_of(self.family, part)
        with torch.device("meta"):
            if self.family.parts[part][0] == "diffusers":
                return kind.from_config(kind.load_config(self.folder, subfolder=part))
            return kind(kind.config_class.from_pretrained(self.folder, subfolder=part))

    def load_encoders(self, dtype: Any = None) -> dict[str, Any]:
        """The text encoders by part, frozen."""
        return {part: self.load(part, dtype) for part in self.family.encoders}

    def load_tokenizers(self) -> dict[str, Any]:
        """The text encoders' parts -> their CLIP tokenizers."""
        from transformers import CLIPTokenizer

        return {
            part: CLIPTokenizer.from_pretrained(self.folder / name, local_files_only=True)
            for part, name in self.family.encoders.items()
        }

    def load_objective(self) -> Objective:
        """What its denoiser learns, with the model's own noise schedule."""
        return self.family.load_objective(self.folder, self.spec)

    def load_sampler(self) -> Any:
        """The sampler that images are generated with."""
        return self.family.load_sampler(self.folder, self.spec)


def class_of(family: Family, part: str) -> Any:
    """The class of a network."""
    library, name = family.parts[part]
    with needs_package("Training", "Run: fastsd install dreambooth"):
        return getattr(importlib.import_module(library), name)


def _silence_bars() -> None:
    # Their bars for every part would bury the lines that matter; ours tell where the run is.
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()


def put_tensors(module: Any, tensors: "dict[str, torch.Tensor]") -> None:
    """Load weights saved under plain names, whatever spelling this module's library version has."""
    own = module.state_dict()
    spelling = {plain_name(name): name for name in own}
    module.load_state_dict({spelling.get(name, name): tensor for name, tensor in tensors.items()})


def checkpoint_gradients(module: Any) -> None:
    """Keep few of the values of the forward pass and compute the others again in the backward pass."""
    if hasattr(module, "enable_gradient_checkpointing"):
        module.enable_gradient_checkpointing()
    else:
        # The older form finds no gradient where a frozen layer comes first, as it does with LoRA.
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module.train()  # both libraries checkpoint only in training mode; these models have no dropout


def dtypes_of(family: Family, config: ResolvedConfig) -> tuple[Any, Any]:
    """The torch dtypes of the arithmetic (None: that of the weights) and of the networks of a stage.

    A LoRA's own matrices are in float32 all the same.
    """
    import torch

    compute = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[config.precision]
    half = family.half_base if config.method == "lora" else weight_bytes(config) == 2
    return compute, compute if compute and half else torch.float32


def suits_cpu(config: ResolvedConfig, device: str) -> bool:
    """Whether networks are used in the form that is fast in training in bf16 on a CPU."""
    return device == "cpu" and config.precision != "fp32"


def suit_cpu(module: Any) -> None:
    """Choose the forms of attention and GroupNorm that are fast in training in bf16 on a CPU.

    The backward pass of torch's fused attention takes up to three times as long as the plain one's where there are few
    tokens, as there always are of a prompt (benchmarks/results/dreambooth_step.md), and GroupNorm's takes 5 to 20 times
    as long on the channels-last values that bf16 convolutions hand over. In fp32 neither is so.
    """
    import torch
    from torch.nn import functional

    def group_norm(norm: Any, x: "torch.Tensor") -> "torch.Tensor":
        return functional.group_norm(x.contiguous(), norm.num_groups, norm.weight, norm.bias, norm.eps)

    if hasattr(module, "set_attn_processor"):
        module.set_attn_processor(_AttentionByLength())
    elif hasattr(module, "set_attn_implementation"):
        module.set_attn_implementation("eager")
    for part in module.modules():
        if isinstance(part, torch.nn.GroupNorm):
            part.forward = MethodType(group_norm, part)


class _AttentionByLength:
    """A processor for diffusers' attention: plain where it looks at few tokens, else torch's fused one."""

    def __init__(self) -> None:
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

        self._plain, self._fused = AttnProcessor(), AttnProcessor2_0()

    def __call__(
        self, attention: Any, values: "torch.Tensor", encoder_hidden_states: Any = None, **rest: Any
    ) -> "torch.Tensor":
        looked_at = values if encoder_hidden_states is None else encoder_hidden_states
        tokens = looked_at.shape[1] if looked_at.dim() == 3 else looked_at.shape[2:].numel()
        chosen = self._plain if tokens < _MANY_TOKENS else self._fused
        return chosen(attention, values, encoder_hidden_states, **rest)
