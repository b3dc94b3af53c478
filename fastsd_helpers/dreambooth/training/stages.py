"""What each stage trains, and how one optimizer step of it is taken.

A stage's name is also the role of its weights in a checkpoint. What differs between families is asked of `Family`.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastsd_helpers.device import Device, reuse_freed_memory
from fastsd_helpers.dreambooth.dataset.buckets import Bucket, sort_into_buckets
from fastsd_helpers.dreambooth.families import Conditions, Family
from fastsd_helpers.dreambooth.settings import ResolvedConfig
from fastsd_helpers.dreambooth.training.base_model import (
    BaseModel,
    checkpoint_gradients,
    dtypes_of,
    plain_names,
    put_tensors,
    suit_cpu,
    suits_cpu,
)
from fastsd_helpers.dreambooth.training.cache import SortedLatents, encode_buckets, encode_prompts
from fastsd_helpers.dreambooth.training.ema import Average
from fastsd_helpers.dreambooth.training.lora import add_lora, lora_parameters, merge_lora, plain_lora_name
from fastsd_helpers.dreambooth.training.loss import HeldOut, held_out_loss, make_held_out, training_loss
from fastsd_helpers.dreambooth.training.optimizers import Stepper, sum_gradients
from fastsd_helpers.dreambooth.training.randomness import Batch, draw_offset, draw_step
from fastsd_helpers.dreambooth.training.segments import STAGE_NAMES
from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.processes import Ranks

if TYPE_CHECKING:
    import torch

    from fastsd_helpers.dreambooth.dataset.prepared import Dataset, PreparedImage
    from fastsd_helpers.dreambooth.resume import Generation

__all__ = ["StageTrainer", "TrainingContext", "open_stage"]


class TrainingContext:
    """What both stages share: base model, device, precision, caches, and what was trained so far."""

    def __init__(
        self, base: BaseModel, config: ResolvedConfig, device: Device, *, ranks: Ranks | None = None, parts: int = 0
    ) -> None:
        import torch

        self.base, self.config = base, config
        self.ranks, self.parts = ranks or Ranks(), parts or config.accumulation  # `parts` of all processes together
        self.family: Family = base.family
        self.device = torch.device(device.kind)
        self.dtype = dtypes_of(self.family, config)[0]
        self.objective = base.load_objective()
        self.tokenizers = base.load_tokenizers()
        self.trained: dict[str, dict[str, torch.Tensor] | None] = dict.fromkeys(STAGE_NAMES)
        self.latents: SortedLatents
        self.held_out: tuple[HeldOut, ...]
        self.held_out_label = ""
        self.prompts: list[str] = []
        self.prompt_of: list[int] = []  # training image -> its prompt's index
        self.class_latents: SortedLatents | None = None
        self.class_prompt_of: list[int] = []  # class image -> its prompt's index in `texts`
        self.bucket_info: dict[str, Any] = {}  # what a LoRA file says of the buckets
        if config.deterministic:
            torch.use_deterministic_algorithms(True)
        if device.kind == "cpu":
            reuse_freed_memory()

    @property
    def base_dtype(self) -> Any:
        """The torch dtype in which the networks of a stage are kept; a LoRA's own matrices are in float32."""
        return dtypes_of(self.family, self.config)[1]

    def autocast(self) -> contextlib.AbstractContextManager:
        """Half-precision arithmetic where the settings ask for it."""
        import torch

        return torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()

    @property
    def texts(self) -> list[str]:
        """Every text that training needs: the prompts, the classes, and the prompts as they are sampled."""
        shown = [self.as_shown(prompt) for prompt in self.prompts] if self.base.spec.quality else []
        return [*self.prompts, *self.config.class_prompts, *shown]

    def as_shown(self, prompt: str) -> str:
        """A training prompt as images are sampled with it: after the quality words that the model was trained with."""
        quality = self.base.spec.quality
        return f"{quality}, {prompt}" if quality else prompt

    def prepare(self, module: Any) -> Any:
        """Move a network to the device, in the form that is fast there."""
        if suits_cpu(self.config, self.device.type):
            suit_cpu(module)
        return module.to(self.device)

    def sort(self, images: "tuple[PreparedImage, ...]", *, classes: bool = False) -> tuple[Bucket, ...]:
        """Sort images, or class images, into the buckets of every resolution that they are trained at."""
        return sort_into_buckets(images, self.resolutions(classes=classes), self.base.spec.multiple)

    def resolutions(self, *, classes: bool = False) -> tuple[int, ...]:
        """Those that are trained; class images have that of the samples, and a larger one would blur them."""
        every, most = self.config.training_resolutions, self.config.resolution
        return tuple(px for px in every if not classes or px <= most) or every[:1]

    def fill_caches(
        self,
        dataset: "Dataset",
        class_images: "tuple[PreparedImage, ...]" = (),
        *,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Encode every image once, and fix the held-out noise; the VAE is freed afterwards.

        Raises:
            Interrupted: `stopped` said so.
        """
        config = self.config
        with self.ranks.in_turn():
            vae = self.base.load("vae").to(self.device)
        encode = partial(encode_buckets, self.family, vae, device=self.device, ranks=self.ranks, stopped=stopped)
        self.latents = encode(dataset.train, self.sort(dataset.train), flip=config.flip)
        judged = dataset.held_out or dataset.train
        self.held_out_label = "held-out images" if dataset.held_out else "training images, reserved noise"
        latents = self.latents
        if dataset.held_out:
            latents = encode(dataset.held_out, self.sort(dataset.held_out))
        self.prompts = sorted({image.prompt for image in (*dataset.train, *dataset.held_out)})
        place = {prompt: index for index, prompt in enumerate(self.prompts)}
        self.prompt_of = [place[image.prompt] for image in dataset.train]
        self.held_out = tuple(
            make_held_out(
                bucket,
                [place[judged[image].prompt] for image in images],
                seed=config.seed,
                label=self.held_out_label,
                objective=self.objective,
                bucket=number,
            )
            for number, (bucket, images) in enumerate(zip(latents.buckets, latents.images, strict=True))
        )
        if class_images:
            self.class_latents = encode(class_images, self.sort(class_images, classes=True))
            first, classes = len(self.prompts), self.config.class_prompts
            self.class_prompt_of = [first + classes.index(image.prompt) for image in class_images]

    def draw_batch(self, key: str, step: int, part: int) -> Batch:
        """What forward pass `part` of an optimizer step is made of: a function of (seed, key, step, part) alone.

        Args:
            key: the stage's name, in a later segment of the run with its number (`unet+1`).
            step: counted from 0 in what the key names.
            part: of the passes that are summed.
        """
        import torch

        own = self._draw_rows(key, step, part, self.latents, self.prompt_of, flip=self.config.flip)
        if self.class_latents is None:
            return own
        others = self._draw_rows(f"{key}/class", step, part, self.class_latents, self.class_prompt_of)
        if own.latents.shape[1:] != others.latents.shape[1:]:
            return replace(own, apart=others)
        return Batch(
            torch.cat([own.latents, others.latents]),
            torch.cat([own.noise, others.noise]),
            torch.cat([own.timesteps, others.timesteps]),
            own.prompts + others.prompts,
            class_rows=len(others.prompts),
            pictures=None if own.pictures is None else torch.cat([own.pictures, others.pictures]),
        )

    def _draw_rows(
        self, key: str, step: int, part: int, pictures: SortedLatents, prompt_of: list[int], *, flip: bool = False
    ) -> Batch:
        config = self.config
        draw = draw_step(
            config.seed,
            key,
            step,
            part,
            parts=self.parts,
            batch_size=config.batch_size,
            images=pictures.counts,
            latent_shapes=pictures.shapes,
            draw_times=self.objective.draw_times,
            flip=flip,
        )
        noise = draw.noise
        if config.offset_noise:
            offset = draw_offset(config.seed, key, step, part, batch_size=config.batch_size, channels=noise.shape[1])
            noise = noise + config.offset_noise * offset
        bucket, images = pictures.buckets[draw.bucket], pictures.images[draw.bucket]
        latents = bucket.draw(draw.images, draw.flips, draw.posterior_noise).to(self.device)
        prompts = [prompt_of[images[row]] for row in draw.images]
        numbers = bucket.numbers_of(draw.images, draw.flips)
        told = None if numbers is None else numbers.to(self.device)
        return Batch(latents, noise.to(self.device), draw.timesteps.to(self.device), prompts, pictures=told)

    def encode_prompts(self, prompts: list[str]) -> Conditions:
        """Texts as the encoders are now, in float32 on the CPU; the encoders are freed afterwards."""
        return encode_prompts(self.family, self.load_encoders(), self.tokenizers, prompts, device=self.device)

    def empty_text(self) -> Conditions:
        """The empty prompt, one row: what guidance leads away from."""
        return self.encode_prompts([""])

    def load_encoders(self) -> dict[str, Any]:
        """The text encoders in float32 as they are now: trained when stage 1 is done, else the base model's."""
        encoders = self.base.load_encoders().items()
        return {part: self.prepare(self._with_trained(module, part)) for part, module in encoders}

    def load_denoiser(self) -> Any:
        """The denoiser as it is now, on the device."""
        part = self.family.denoiser
        return self.prepare(self._with_trained(self.base.load(part, self.base_dtype), part))

    def load_to_train(self, stage: str) -> dict[str, Any]:
        """A stage's networks on the device as it begins: with method lora without what its matrices add to them."""
        found = {}
        for part in self.family.parts_of(stage):
            module = self.base.load(part, self.base_dtype)
            found[part] = self.prepare(module if self.config.method == "lora" else self._with_trained(module, part))
        return found

    def trained_parts(self) -> "dict[str, dict[str, torch.Tensor] | None]":
        """Network's part -> what was trained of it; None where nothing was."""
        found: dict[str, dict[str, torch.Tensor] | None] = {}
        for stage, tensors in self.trained.items():
            parts = self.family.parts_of(stage)
            for part in parts:
                start = f"{part}." if len(parts) > 1 else ""
                own = {
                    name.removeprefix(start): tensor
                    for name, tensor in (tensors or {}).items()
                    if name.startswith(start)
                }
                found[part] = own if tensors is not None else None
        return found

    def _with_trained(self, module: Any, part: str) -> Any:
        tensors = self.trained_parts().get(part)
        if tensors is not None and self.config.method == "lora":
            self._merge(module, tensors)
        elif tensors is not None:
            put_tensors(module, tensors)
        return module

    def _merge(self, module: Any, tensors: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        """Put a LoRA into a module's own weights; returns them all."""
        own = module.state_dict()
        for name, merged in merge_lora(own, tensors, alpha=self.config.lora_alpha):
            own[name].copy_(merged)
        return own

    def whole_parts(self) -> "dict[str, Any]":
        """Each part as a checkpoint file needs it: all of its tensors, or the base model's folder where untouched."""
        trained, whole = self.trained_parts(), {}
        for part in dict.fromkeys([*trained, *self.family.parts]):
            tensors = trained.get(part)
            whole[part] = tensors or self.base.folder / part
            if tensors is not None and self.config.method == "lora":
                whole[part] = plain_names(self._merge(self.base.load(part), tensors))
        return whole

    def keep(self, trainer: "StageTrainer") -> None:
        """Remember a finished stage's weights for the next stage and for the finished file."""
        self.trained[trainer.stage] = {name: tensor.cpu() for name, tensor in trainer.weights().items()}


class StageTrainer(ABC):
    """One stage under way: the trained module, its optimizer, and the step."""

    stage: str
    unet: Any  # the denoiser

    def __init__(
        self, context: TrainingContext, networks: dict[str, Any], lr: float, *, key: str = "", before: int = 0
    ) -> None:
        import torch

        self.context, self.networks = context, networks
        single = len(networks) == 1
        self.module = next(iter(networks.values())) if single else torch.nn.ModuleDict(networks)
        self.key, self._before = key or self.stage, before
        config = context.config
        named = self.module.named_parameters()
        if config.method == "lora":
            add_lora(
                context.family,
                networks,
                self.stage,
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                seed=config.seed,
                targets=config.lora_targets,
            )
            named = lora_parameters(self.module)
        found = dict(named)
        self.names = [plain_lora_name(name) for name in found]
        self.parameters = [parameter.requires_grad_(True) for parameter in found.values()]
        learned = context.trained[self.stage]
        if config.method == "lora" and learned is not None:  # in the segment before this one
            self._put(learned)
        self.average = Average(self.parameters, config.ema) if config.ema else None
        named = dict(zip(self.names, self.parameters, strict=True))
        scaled = context.dtype is torch.float16
        self.stepper = Stepper(config.optimizer, named, lr, device=context.device, scaled=scaled, parts=context.parts)
        if context.config.gradient_checkpointing:
            for network in networks.values():
                checkpoint_gradients(network)

    @abstractmethod
    def text_for(self, prompts: list[int]) -> Conditions:
        """The conditions of prompts by index, on the device."""

    def predict(self, *asked: Any) -> "torch.Tensor":
        """The denoiser's prediction, as `Family.predict`."""
        return self.context.family.predict(self.unet, *asked)

    def take_step(self, step: int, lr: float) -> float:
        """One optimizer step; returns its mean loss. Steps are counted over all segments, chance within its own."""
        own = step - self._before
        self.stepper.begin(lr, (self.context.config.seed, self.key, own))
        total = sum_gradients(self.context.ranks, self.context.parts, self.parameters, partial(self._backward, own))
        self.stepper.step()
        if self.average:
            self.average.update(own)
        return total

    def _backward(self, own: int, part: int) -> float:
        """Add the gradients of a step's part to what there is; returns its loss."""
        with self.context.autocast():
            loss = self.loss_of(self.context.draw_batch(self.key, own, part))
        self.stepper.scale(loss / self.context.parts).backward()
        return loss.item()

    def loss_of(self, batch: Batch) -> "torch.Tensor":
        """The loss of one forward pass, or of two where class images are of another size."""
        config = self.context.config
        loss = training_loss(
            self.predict,
            self.context.objective,
            batch.latents,
            batch.noise,
            batch.timesteps,
            self.text_for(batch.prompts),
            batch.pictures,
            min_snr=config.min_snr,
            class_rows=batch.class_rows,
            prior_weight=config.prior_weight,
        )
        return loss if batch.apart is None else loss + config.prior_weight * self.loss_of(batch.apart)

    def shown(self) -> contextlib.AbstractContextManager:
        """While this lasts, the module holds the weights that are judged, drawn with and exported."""
        return self.average.shown() if self.average else contextlib.nullcontext()

    def held_out_loss(self) -> float:
        """The held-out loss of the model as it is now."""
        import torch

        context = self.context
        with self.shown(), context.autocast(), torch.no_grad():
            text = self.text_for(list(range(len(context.prompts)))).float()
            return held_out_loss(self.predict, context.objective, context.held_out, text, device=context.device)

    def weights(self) -> "dict[str, torch.Tensor]":
        """What was learned so far, under plain names: the module's tensors, or those of its LoRA; averaged with ema."""
        with self.shown():
            return self._tensors()

    def _tensors(self) -> "dict[str, torch.Tensor]":
        if self.context.config.method == "lora":
            return {plain_lora_name(name): parameter.data for name, parameter in lora_parameters(self.module)}
        return plain_names(self.module.state_dict())

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """All that a resumed run needs: tensors by role, and JSON-able values."""
        optimizer, rest = self.stepper.state()
        tensors = {self.stage: self.weights(), "optimizer": optimizer}
        if self.average:
            tensors["raw"] = self._tensors()
        return tensors, rest

    def restore(self, generation: "Generation") -> None:
        """Go on from a checkpoint."""
        learned = generation.load(self.stage)
        if self.average:
            self.average.put([learned[name] for name in self.names])
            learned = generation.load("raw")
        self._put(learned)
        self.stepper.restore(generation.load("optimizer"), generation.record)

    def _put(self, tensors: "dict[str, torch.Tensor]") -> None:
        if self.context.config.method == "full":
            put_tensors(self.module, tensors)
            return
        own = self._tensors()
        if own.keys() != tensors.keys():
            raise CheckpointError(
                "The checkpoint's LoRA has other layers than this model.",
                "It belongs to another model: start again with --restart.",
            )
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


class TextEncoderTrainer(StageTrainer):
    """Stage 1: the text encoders learn, through a denoiser that stays as it is."""

    stage = "text_encoder"

    def __init__(self, context: TrainingContext, **leg: Any) -> None:
        with context.ranks.in_turn():
            networks = context.load_to_train(self.stage)
            self.unet = context.load_denoiser()
        super().__init__(context, networks, context.config.text_encoder_lr, **leg)
        if context.config.gradient_checkpointing:
            checkpoint_gradients(self.unet)  # its values are needed on the way back to the text encoder
        ids = context.family.tokenize(context.tokenizers, context.texts)
        self.ids = {part: rows.to(context.device) for part, rows in ids.items()}

    def text_for(self, prompts: list[int]) -> Conditions:
        return self.context.family.encode(self.networks, {part: rows[prompts] for part, rows in self.ids.items()})


class UnetTrainer(StageTrainer):
    """Stage 2: the denoiser learns on texts that were encoded once; the text encoders are gone from memory."""

    stage = "unet"

    def __init__(self, context: TrainingContext, **leg: Any) -> None:
        # By the first process alone: the loading takes longer than the work.
        self.text = context.ranks.share(lambda: context.encode_prompts(context.texts))
        with context.ranks.in_turn():
            networks = context.load_to_train(self.stage)
        super().__init__(context, networks, context.config.unet_lr, **leg)
        self.unet = self.module

    def text_for(self, prompts: list[int]) -> Conditions:
        return self.text[prompts].to(self.context.device)


def open_stage(
    stage: str, context: TrainingContext, resumed: "Generation | None", *, key: str = "", before: int = 0
) -> StageTrainer:
    """Set a stage up at its beginning, or as the checkpoint `resumed` left it.

    Args:
        stage: what is trained.
        context: with what it is trained.
        resumed: the checkpoint; its optimizer's state is gone on with too.
        key: of a later segment: what its randomness is drawn with.
        before: of a later segment: the stage's steps in earlier ones.
    """
    kind = TextEncoderTrainer if stage == "text_encoder" else UnetTrainer
    trainer = kind(context, key=key, before=before)
    if resumed is not None:
        trainer.restore(resumed)
    return trainer
