"""The settings of one DreamBooth run, and how what the user left alone is filled in."""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from fastsd_helpers.device import Device
from fastsd_helpers.downloads import holds_secret
from fastsd_helpers.dreambooth.families import family_named
from fastsd_helpers.dreambooth.presets import (
    PRESETS,
    choose_optimizer,
    choose_precision,
    choose_prior,
    choose_rates,
    choose_steps,
    rows_per_step,
)
from fastsd_helpers.dreambooth.resolutions import LEAST_PX, MOST_PX, read_resolutions
from fastsd_helpers.errors import SettingsError
from fastsd_helpers.options import GIVEN, check, given_names, option, options_of
from fastsd_helpers.registry import ModelSpec

__all__ = [
    "DreamBoothConfig",
    "Given",
    "PlannedConfig",
    "ResolvedConfig",
    "given_values",
    "refuse_changes",
    "resolve_settings",
    "settings_for_more",
]

Given = dict[str, Any]

# These decide what is kept and shown, not which weights come out: a resumed run may change them.
_FREE_TO_CHANGE = ("save_every", "keep_last", "keep_best", "sample_every", "processes")
# The weights that a run has learned fit nothing else. preset and steps only chose values, which are named instead.
_LORA = ("lora_rank", "lora_alpha", "lora_targets")
_FIXED = ("base_model", "method", "preset", "steps", "prediction_type", "zsnr", *_LORA)
_STEPS = ("unet_steps", "text_encoder_steps")
# "auto" in these means: as it is, or as it suits.
_MAY_BE_AUTO = ("base_model", "precision", "optimizer", "prediction_type")

# What a run did before these settings existed, and what is left when neither user nor preset chooses.
_OFF: Given = {
    "method": "full",
    "preset": "none",
    "steps": "model",
    "class_prompt": None,
    "prior_weight": 0.0,
    "class_images": 0,
    "class_folder": None,
    "class_guidance": 7.5,
    "min_snr": 0.0,
    "offset_noise": 0.0,
    "ema": 0.0,
    "lora_rank": 16,
    "lora_alpha": 16.0,
    "lora_targets": "attention",
    "prediction_type": "auto",
    "zsnr": None,
    "resolutions": None,
    "keep_best": False,
    "processes": 1,
}
_CLASS_PROMPT = "a class_prompt (--class-prompt), such as 'a photo of a dog'"


@dataclass(frozen=True)
class DreamBoothConfig:
    """Settings for one DreamBooth run; what is not set follows the base model, the device or the session."""

    base_model: str = option(
        "auto",
        help="base model to fine-tune: auto, a key (sd15, demo), a Hub id (owner/name), a folder, a file or a link",
    )
    method: Literal["full", "lora"] = option(
        "full",
        help="full: trains every weight; lora: trains small matrices added to them (a file of MB, not GB); default: "
        "full, and lora for SDXL",
        follows=True,
    )
    preset: Literal["none", "face", "object", "style"] = option(
        "none", help="default settings for a kind of subject; also sets the steps from the number of photos"
    )
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = option(
        "auto",
        help="what the base model predicts: noise (epsilon) or velocity (v_prediction); auto: as the model says, and a "
        "question where it does not",
        advanced=True,
    )
    zsnr: bool | None = option(
        None,
        help="zero terminal SNR: the noise schedule ends in pure noise, for models that predict velocity and were "
        "trained so; default: as the model says",
        advanced=True,
    )
    instance_prompt: str | None = option(
        None,
        help="instance prompt: what the photos show, e.g. 'a photo of zib dog'; default: the words of the file names",
    )
    class_prompt: str | None = option(
        None,
        help="class prompt for prior preservation: what the subject is an example of, e.g. 'a photo of a dog', so that "
        "the model keeps its idea of it; several classes are separated by |",
    )
    steps: Literal["model", "auto"] = option(
        "model", help="training steps that are not set: the model's defaults, or auto: from the number of photos"
    )
    unet_steps: int | None = option(
        None, help="optimizer steps of the U-Net; 0 skips it; default: the model's", low=0, high=200_000
    )
    unet_lr: float | None = option(None, help="learning rate of the U-Net; default: the model's", low=1e-9, high=1e-2)
    text_encoder_steps: int | None = option(
        None, help="optimizer steps of the text encoder; 0 skips it; default: the model's", low=0, high=200_000
    )
    text_encoder_lr: float | None = option(
        None, help="learning rate of the text encoder; default: the model's", low=1e-9, high=1e-2
    )
    resolution: int | None = option(
        None,
        help="resolution: side of the training images in pixels; default: the model's",
        low=LEAST_PX,
        high=MOST_PX,
    )
    resolutions: str | None = option(
        None,
        help="training resolutions: several at once, such as 512,768,1024; each image is trained at all of them, and "
        "samples have the resolution above; default: that alone",
        advanced=True,
    )
    batch_size: int | None = option(
        None, help="batch size: images per forward pass; default: the model's", low=1, high=64, advanced=True
    )
    accumulation: int = option(
        1, help="gradient accumulation steps: forward passes per optimizer step", low=1, high=64, advanced=True
    )
    processes: int | None = option(
        None,
        help="processes, one on each GPU, that share the forward passes of each optimizer step; default: auto, which "
        "is one on every GPU",
        low=1,
        high=64,
        advanced=True,
    )
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = option(
        "linear",
        help="learning rate schedule: how the learning rate falls over each stage; default: linear, and "
        "constant_with_warmup for SDXL",
        advanced=True,
        follows=True,
    )
    prior_weight: float | None = option(
        None,
        help="prior loss weight: how much the class images count compared with the photos; 0 = off; default: 1 with a "
        "class prompt",
        low=0.0,
        high=10.0,
        advanced=True,
    )
    class_images: int | None = option(
        None,
        help="class (regularization) images, generated by the base model; 0 = off; default: 100 with a class prompt",
        low=0,
        high=5000,
        advanced=True,
    )
    class_folder: str | None = option(
        None,
        help="folder or zip with your own class (regularization) images, all of which are used; default: they "
        "are generated by the base model",
        advanced=True,
    )
    class_guidance: float = option(
        1.0,
        help="guidance scale (CFG) of the class images: 1 generates without guidance, as the model itself has "
        "learned; other trainers use 7.5, with which one small measurement saw more drift",
        low=1.0,
        high=30.0,
        advanced=True,
    )
    min_snr: float | None = option(
        None,
        help="min-SNR gamma: caps the loss weight of timesteps with little noise (5 is usual); 0 = off; default: the "
        "preset's, else off",
        low=0.0,
        high=100.0,
        advanced=True,
    )
    offset_noise: float | None = option(
        None,
        help="offset noise strength: adds one random value per channel to the noise, for very dark or bright images "
        "(0.1 is usual); 0 = off; default: the preset's, else off",
        low=0.0,
        high=1.0,
        advanced=True,
    )
    ema: float = option(
        0.0,
        help="EMA decay: keeps an exponential moving average of the weights, which is then evaluated and exported; 0 = "
        "off",
        low=0.0,
        high=0.99999,
        advanced=True,
    )
    lora_rank: int = option(
        16,
        help="LoRA rank (network_dim): inner size of the LoRA matrices",
        low=1,
        high=256,
        advanced=True,
    )
    lora_alpha: float | None = option(
        None,
        help="LoRA alpha (network_alpha): the LoRA is scaled by alpha / rank; default: the rank",
        low=0.01,
        high=1024.0,
        advanced=True,
    )
    lora_targets: Literal["attention", "all linears"] | None = option(
        None,
        help="LoRA target layers: attention, or all linears of the transformer blocks (as kohya's scripts, a larger "
        "file); default: the model's",
        advanced=True,
    )
    seed: int = option(
        42, help="random seed: decides the order of the images, noise and timesteps", low=0, high=2**31 - 1
    )
    flip: bool = option(
        False, help="horizontal flip: also train on mirrored images (not for faces or text)", advanced=True
    )
    precision: Literal["auto", "fp32", "fp16", "bf16"] = option(
        "auto",
        help="mixed precision: dtype of the forward pass; weights are trained in fp32, by adafactor with bf16 in bf16"
        " with stochastic rounding",
        advanced=True,
    )
    optimizer: Literal["auto", "adamw", "adamw8bit", "adafactor"] = option(
        "auto",
        help="optimizer: AdamW, 8-bit AdamW, which needs an NVIDIA GPU and bitsandbytes, or Adafactor for all weights "
        "in little memory, with fused backward; default: adafactor for all weights of SDXL",
        advanced=True,
    )
    gradient_checkpointing: bool | None = option(
        None,
        help="gradient checkpointing: less memory, about a quarter slower; default: by the memory that is there",
        advanced=True,
    )
    save_every: int | None = option(
        None,
        help="steps between checkpoints; 0 saves only at the end of each stage; default: chosen from free space",
        low=0,
        high=200_000,
    )
    keep_last: int | None = option(
        None, help="complete checkpoints kept; default: two where they fit", low=1, high=100, advanced=True
    )
    keep_best: bool = option(
        False,
        help="also keep the best weights, those with the lowest held-out loss; needs space for one more model",
        advanced=True,
    )
    sample_every: int | None = option(
        None,
        help="steps between sample images and held-out (validation) losses; 0 = none; default: four times per stage",
        low=0,
        high=200_000,
    )
    deterministic: bool = option(
        False,
        help="deterministic training on a GPU: a run resumed on the same kind of GPU is bit-identical, at some cost in "
        "speed",
        advanced=True,
    )

    def __new__(cls, *values: Any, **named: Any) -> "DreamBoothConfig":
        """Note which settings are given: one that equals its default counts when it was written down."""
        config = super().__new__(cls)
        names = [spec.name for spec in fields(cls)][: len(values)]
        object.__setattr__(config, GIVEN, frozenset([*names, *named]))
        return config

    def __post_init__(self) -> None:
        if str(self.processes) == "auto":
            object.__setattr__(self, "processes", None)
        extra = []
        if self.unet_steps == 0 and self.text_encoder_steps == 0:
            extra.append("unet_steps and text_encoder_steps are both 0: nothing would be trained")
        if isinstance(self.base_model, str) and not self.base_model.strip():
            extra.append("base_model (--base-model) is empty")
        if isinstance(self.base_model, str) and holds_secret(self.base_model):
            # Settings are written into the session and shown; a token would be too.
            extra.append(
                "base_model (--base-model) is a link with a token or password in it: take that part out of the link "
                "and set the token as CIVITAI_TOKEN"
            )
        classes = self.class_prompt.split("|") if isinstance(self.class_prompt, str) else []
        if any(not part.strip() for part in classes):
            extra.append("class_prompt (--class-prompt) is empty, or has an empty part next to a |")
        if not classes and (self.prior_weight or self.class_images):
            extra.append(f"prior_weight (--prior-weight) and class_images (--class-images) need {_CLASS_PROMPT}")
        if not classes and self.class_folder:
            extra.append(f"class_folder (--class-folder) needs {_CLASS_PROMPT}")
        if isinstance(self.resolutions, str):
            try:  # one spelling, so that the same sides are the same setting
                object.__setattr__(self, "resolutions", ",".join(map(str, read_resolutions(self.resolutions))))
            except ValueError as err:
                extra.append(f"resolutions (--resolutions) {err}")
        check(self, extra)

    @property
    def training_resolutions(self) -> tuple[int, ...]:
        """Sides in pixels of the squares whose area the training images have, the smallest first."""
        if self.resolutions:
            return read_resolutions(self.resolutions)
        return (self.resolution,) if self.resolution else ()

    @property
    def class_prompts(self) -> tuple[str, ...]:
        """The classes whose images are trained beside the photos; empty without prior preservation."""
        if not (self.class_prompt and self.prior_weight and self.class_images):
            return ()
        return tuple(" ".join(part.split()) for part in self.class_prompt.split("|"))


if TYPE_CHECKING:

    class ResolvedConfig(DreamBoothConfig):
        """The settings after `resolve_settings`: only what depends on memory and free space may still be open."""

        unet_lr: float
        text_encoder_lr: float
        resolution: int
        batch_size: int
        prior_weight: float
        class_images: int
        min_snr: float
        lora_alpha: float
        lora_targets: Literal["attention", "all linears"]

    class PlannedConfig(ResolvedConfig):
        """The settings after `plan_run`: nothing about saving is open."""

        save_every: int
        keep_last: int
        sample_every: int

else:  # a type checker tells them apart; they are made by `replace`
    ResolvedConfig = PlannedConfig = DreamBoothConfig


def given_values(config: DreamBoothConfig) -> Given:
    """What the user really chose: the fields that were written down, whatever their values, and are not left alone."""
    named = given_names(config)
    values = {spec.name: getattr(config, spec.name) for spec in fields(config) if spec.name in named}
    return {
        name: value
        for name, value in values.items()
        if value is not None and not (name in _MAY_BE_AUTO and value == "auto")
    }


def resolve_settings(
    config: DreamBoothConfig, spec: ModelSpec, device: Device, *, saved: Given | None = None, photos: int = 0
) -> tuple[ResolvedConfig, list[str]]:
    """Fill in every field that was left alone; returns the settings and the reasons for the automatic ones.

    What the user gave wins, then what the session was started with (`saved`), then the preset, the number of photos
    (`photos`) where steps are automatic, the model's defaults and the device's. After this only gradient_checkpointing,
    which depends on the memory, and save_every, keep_last and sample_every, which depend on free space, may be None.

    Raises:
        SettingsError: a resumed run would change; every changed setting is listed.
    """
    if saved is not None:
        given = given_values(config)
        refuse_changes(given, saved)
        known = {field.name for field in fields(config)}
        changed = {name: given[name] for name in _FREE_TO_CHANGE if name in given}
        values = {name: value for name, value in (_OFF | saved).items() if name in known} | changed
        return cast(ResolvedConfig, replace(config, **values)), ["settings this session was started with"]
    reasons: list[str] = []
    named = given_names(config)
    follows = [item.name for item in options_of(DreamBoothConfig) if item.follows and item.name not in named]
    follow = {name: spec.defaults[name] for name in follows if name in spec.defaults}
    if follow:
        config = replace(config, **follow)
        reasons.append(f"from {spec.title}: {', '.join(f'{name} {value}' for name, value in follow.items())}")
    resolved = _fill(config, PRESETS[config.preset].settings, f"from the preset {config.preset}", reasons)
    if config.steps == "auto" or config.preset != "none":
        steps, reason = choose_steps(spec, photos, preset=config.preset, rows=rows_per_step(config, spec))
        resolved = _fill(resolved, steps, reason, reasons)
    rates, reason = choose_rates(spec, config.method)
    resolved = _fill(resolved, rates, reason, reasons)
    resolved = _fill(resolved, spec.defaults, f"from {spec.title}", reasons)
    prior = choose_prior(resolved)
    if resolved.class_folder:  # as many as there are in it, which is said where they are counted
        resolved = _fill(resolved, {"class_images": prior.pop("class_images", None)}, "", reasons)
    resolved = _fill(resolved, prior, "prior preservation, because there is a class prompt", reasons)
    if config.method == "full" and (config.lora_alpha is not None or config.lora_rank != _OFF["lora_rank"]):
        reasons.append("lora_rank and lora_alpha have no effect with method full")
    resolved = _fill(resolved, {**_OFF, "lora_alpha": float(config.lora_rank)}, "", reasons)
    chosen: Given = {}
    chosen["precision"], precision_reason = choose_precision(resolved.precision, device)
    large = spec.trainable and family_named(spec.family).large
    resolved = replace(resolved, precision=chosen["precision"])
    chosen["optimizer"], optimizer_reason = choose_optimizer(resolved, device, large=large)
    reasons += [precision_reason, optimizer_reason]
    if spec.prediction_type in ("epsilon", "v_prediction"):
        chosen |= {"prediction_type": spec.prediction_type, "zsnr": spec.zero_terminal_snr}
    return cast(ResolvedConfig, replace(resolved, **chosen)), [reason for reason in reasons if reason]


def _fill(config: DreamBoothConfig, values: Given, reason: str, reasons: list[str]) -> DreamBoothConfig:
    """Set the fields that are still left alone; with a reason, what was set is said."""
    followed = {name: value for name, value in values.items() if getattr(config, name, 0) is None}
    if followed and reason:
        reasons.append(f"{reason}: {', '.join(f'{name} {value}' for name, value in followed.items())}")
    return replace(config, **followed)


def refuse_changes(given: Given, saved: Given, *, begun_steps: Given | None = None, finished: bool = False) -> None:
    """Refuse settings that a run cannot take while it is as it is; each is named with both values.

    Args:
        given: what the user chose now.
        saved: what the run's newest segment was begun with.
        begun_steps: the steps its first segment was begun with; left alone, those in `saved`.
        finished: whether all of its steps are done, so that a new segment can begin.

    Raises:
        SettingsError: one or more of them differ.
    """
    saved = _OFF | saved | (begun_steps or {})
    changed = {
        name: value
        for name, value in given.items()
        if name in saved and name not in _FREE_TO_CHANGE and value != saved[name]
    }
    if not changed:
        return
    listed = "; ".join(f"{name} was {saved[name]!r} and is now {value!r}" for name, value in changed.items())
    raise SettingsError(
        f"This session's run was started with other settings: {listed}.",
        _way_out(changed, saved, finished=finished),
    )


def _way_out(changed: Given, saved: Given, *, finished: bool) -> str:
    ways = ["Leave out those settings to resume it"]
    longer = {name: value - (saved[name] or 0) for name, value in changed.items() if name in _STEPS}
    when = "" if finished else " after its end"
    more = {"unet_steps": "--more-steps", "text_encoder_steps": "--more-text-encoder-steps"}
    for name, count in longer.items():
        if count > 0:
            ways.append(f"to train longer, add {more[name]} {count}{when}")
    if changed.keys() - {*_FIXED, *_STEPS}:
        ways.append(f"to continue training with other ones, add --more-steps N{when}")
    return "; ".join([*ways, "or start again from step 0 with --restart"]) + "."


def settings_for_more(
    given: Given, saved: Given, *, steps: Given, begun_steps: Given, begun_given: Given
) -> tuple[DreamBoothConfig, list[str]]:
    """The settings of a new segment: those of the one before, with what is given now; some are left open.

    Args:
        given: what the user chose now.
        saved: what the segment before was begun with.
        steps: unet_steps and text_encoder_steps of the new one.
        begun_steps: those of the run's first segment, which a form still shows.
        begun_given: what the user had chosen before.

    Returns:
        the settings, and what differs from the segment before, in words.

    Raises:
        SettingsError: what may not change within a run would change.
    """
    saved = _OFF | saved
    fixed = {name: value for name, value in given.items() if name in (*_FIXED, *_STEPS)}
    # Which model it is the weights' hash decides, wherever they lie.
    named = {name: value for name, value in fixed.items() if name != "base_model"}
    refuse_changes(named, saved | begun_steps, finished=True)
    known = {field.name for field in fields(DreamBoothConfig)}
    values = {name: value for name, value in saved.items() if name in known}
    for name in ("save_every", "keep_last", "sample_every"):  # chosen for another number of steps
        values[name] = begun_given.get(name)
    if values["method"] == "full":  # filled in before, and nobody's choice
        values |= {"lora_rank": _OFF["lora_rank"], "lora_alpha": None}
    if given.get("class_prompt") and not saved.get("class_prompt"):
        values |= {"prior_weight": None, "class_images": None}
    changes = {name: value for name, value in given.items() if name not in fixed}
    new = [f"{name} {value}" for name, value in changes.items() if value != saved.get(name)]
    said = f"settings as before, but {', '.join(new)}" if new else "settings as before"
    return DreamBoothConfig(**values | changes | steps), [said]
