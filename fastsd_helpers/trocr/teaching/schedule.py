"""The settings of fine-tuning a model, what is chosen for those that were left alone, and which lines are held out."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from fastsd_helpers.options import check, option
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.reading.dataset import LineSet, read_lines

__all__ = ["FineTuneConfig", "Schedule", "choose_schedule", "split_lines"]

_FEW_PARAMETERS = 20_000_000
_NOISE_OF_SMALL = 0.3
_MEASURED_OF_LEARNED = 50  # lines to measure on where none are held out
_LEAST_EPOCHS, _MOST_EPOCHS, _GOOD_STEPS = 10, 40, 300


@dataclass(frozen=True)
class FineTuneConfig:
    """Settings for fine-tuning a model."""

    method: Literal["full", "freeze", "decoder", "lora"] = option(
        "full",
        help=(
            "trainable parts: full (every weight), freeze (all but the encoder's first layers), decoder (the decoder "
            "alone) or lora (LoRA adapters)"
        ),
    )
    epochs: float | None = option(
        None, help="epochs: passes over all lines; default: 10, more when there are few lines", low=0.01, high=1000
    )
    lr: float | None = option(
        None, help="peak learning rate; default: 4e-5, more for LoRA and small models", low=1e-8, high=1
    )
    batch_size: int = option(8, help="lines per batch", low=1, high=512)
    accumulation: int = option(1, help="gradient accumulation steps: batches per optimizer step", low=1, high=256)
    processes: int | None = option(
        None,
        help=(
            "processes, one on each GPU, that share the batches of each optimizer step; default: auto, which is one on "
            "every GPU"
        ),
        low=1,
        high=64,
        advanced=True,
    )
    augment: bool = option(
        True, help="data augmentation: random rotation, blur, dilation, erosion and distortion of the line images"
    )
    vocabulary: Literal["keep", "extend", "replace"] = option(
        "keep",
        help=(
            "tokenizer vocabulary: keep it, extend it with new characters, or replace it by the characters of these "
            "lines (like kraken's resize)"
        ),
    )
    normal_form: Literal["NFC", "NFD", "none"] = option(
        "NFC",
        help="Unicode normalization form of the texts: composed (NFC), decomposed (NFD), or as they are (none)",
    )
    held_out: float = option(
        0.1,
        help=(
            "validation split: share of the lines held out for evaluation, if none are given; 0: none, and evaluation "
            "is on the training lines"
        ),
        low=0,
        high=0.5,
    )
    patience: int = option(
        3,
        help="early stopping patience: stop after this many evaluations without improvement; 0 never stops early",
        low=0,
        high=100,
    )
    measure_every: int = option(
        0, help="steps between evaluations; 0: once per epoch, at most ten times in all", low=0, high=1_000_000
    )
    language: bool = option(
        True,
        help=(
            "language model: learn a character n-gram from the training texts, and keep it with the model if it lowers "
            "the CER of the validation lines"
        ),
    )
    seed: int = option(0, help="random seed of data order, augmentation and new weights", low=0, high=2**31 - 1)
    frozen_layers: int = option(
        3,
        help="frozen layers: number of first encoder layers not trained, with method freeze",
        low=0,
        high=48,
        advanced=True,
    )
    lora_rank: int = option(
        16, help="LoRA rank: inner size of the adapters, with method lora", low=1, high=256, advanced=True
    )
    warmup: float = option(
        0.06, help="warmup ratio: share of steps in which the learning rate rises", low=0, high=0.5, advanced=True
    )
    weight_decay: float = option(0.01, help="weight decay: pulls weights towards zero", low=0, high=1, advanced=True)
    token_noise: float | None = option(
        None,
        help=(
            "token noise: share of decoder input tokens replaced at random during training, so that the model keeps "
            f"looking at the image; default: {_NOISE_OF_SMALL} for small models, else 0"
        ),
        low=0,
        high=0.9,
        advanced=True,
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", help="mixed precision: compute dtype", advanced=True
    )
    gradient_checkpointing: bool = option(
        False,
        help="gradient checkpointing: half the memory for a third more time",
        advanced=True,
    )

    def __post_init__(self) -> None:
        if str(self.processes) == "auto":
            object.__setattr__(self, "processes", None)
        check(self)


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and with how much noise to learn; `reason` says what was chosen here and why, if anything."""

    epochs: float
    lr: float
    reason: str
    token_noise: float = 0.0


def choose_schedule(config: FineTuneConfig, lines: int, parameters: int) -> Schedule:
    """Fill in the epochs, the learning rate and the noise that were left alone.

    Few lines are seen more often, for a model needs some hundred steps to change its ways; measuring and early
    stopping keep that from doing harm. Small models and adapters take larger steps, and small models soon know few
    lines by heart: an earlier demo model, 200 lines of a hand it had not seen, 400 steps, 49.7 % CER
    before: 36.3 % after without noise (the best; rising since), 32.0 % with 0.3 and twice the rate (still falling).
    """
    epochs, lr, noise, told = config.epochs, config.lr, config.token_noise, []
    small = parameters < _FEW_PARAMETERS
    if epochs is None:
        steps = max(1, math.ceil(lines / config.batch_size / config.accumulation))
        epochs = float(min(_MOST_EPOCHS, max(_LEAST_EPOCHS, math.ceil(_GOOD_STEPS / steps))))
        told.append(f"{epochs:g} epochs, for {lines} lines are {steps} steps each")
    if lr is None:
        lr = (10 if config.method == "lora" else 1) * (2e-4 if small else 4e-5)
        why = "a small model" if small else "a model of this size"
        told.append(f"learning rate {lr:g}, for {'adapters of ' if config.method == 'lora' else ''}{why}")
    if noise is None:
        noise = _NOISE_OF_SMALL if small else 0.0
        if small:
            told.append(f"{noise:.0%} of the letters before are exchanged, so that it keeps looking")
    return Schedule(epochs, lr, f"Chosen: {'; '.join(told)}." if told else "", noise)


def split_lines(config: FineTuneConfig, data: Any, held_out: Any = None) -> tuple[LineSet, LineSet]:
    """The lines a run learns from and those it measures on: as given, by the parts of the set, or by writer or page.

    With `held_out` 0 none are set apart, and some of those that are learned are measured on.

    Raises:
        DatasetError: no usable lines, or a single group of them.
    """
    lines = read_lines(data)
    if held_out is not None:
        return lines.of_part("train") if lines.has_part("train") else lines, read_lines(held_out)
    if lines.has_part("train"):
        held = lines.of_part("validation", "test")
        lines = lines.of_part("train")
        if held.lines and config.held_out:
            logger.info("%d lines for training, %d of %s.", len(lines.lines), len(held.lines), held.source)
            return lines, held
    if not config.held_out:
        # Measured all the same, for a run must show where it is; but what it says is another thing, and said so.
        step = max(1, len(lines.lines) // _MEASURED_OF_LEARNED)
        logger.warning(
            "No line is held out: it is measured on lines that it learns from, which says how well it knows those, and "
            "nothing about new ones."
        )
        return lines, LineSet(lines.lines[::step][:_MEASURED_OF_LEARNED], source=lines.source)
    rest, held = lines.split(config.held_out, seed=config.seed)
    alone = len({line.group for line in lines.lines}) == len(lines.lines)
    others = (
        "other lines, maybe of the same writers and pages, for nothing says which are of one"
        if alone
        else ("other groups (writers, pages, parts of a page)")
    )
    logger.info("%d lines for training, %d of %s to measure on.", len(rest.lines), len(held.lines), others)
    return rest, held
