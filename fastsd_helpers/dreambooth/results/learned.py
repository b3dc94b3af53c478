"""What a session has learned: drawn with, and written as one verified file, at the end of a run or at any time."""

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fastsd_helpers.checkpoints import CheckpointFile, verify_checkpoint, write_checkpoint
from fastsd_helpers.checkpoints.formats.prediction import Prediction, prediction_metadata, sidecar
from fastsd_helpers.checkpoints.models.parts import open_parts
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.device import describe_device
from fastsd_helpers.dreambooth.results.best_checkpoint import choose_checkpoint
from fastsd_helpers.dreambooth.resume import CheckpointStore
from fastsd_helpers.dreambooth.settings import ResolvedConfig
from fastsd_helpers.dreambooth.training.base_model import BaseModel
from fastsd_helpers.dreambooth.training.beginning import find_base
from fastsd_helpers.dreambooth.training.lora import trained_count_of, write_lora_file
from fastsd_helpers.dreambooth.training.sampling import draw_grid, draw_with, sample_prompts, save_picture
from fastsd_helpers.dreambooth.training.segments import STAGE_NAMES
from fastsd_helpers.dreambooth.training.stages import TrainingContext
from fastsd_helpers.errors import CheckpointError, SessionError, SettingsError
from fastsd_helpers.files import sha256_of, write_atomic
from fastsd_helpers.options import check, from_values, option
from fastsd_helpers.runtime import fault_point
from fastsd_helpers.sessions import Session

__all__ = [
    "ExportConfig",
    "ExportResult",
    "SampleConfig",
    "SampleResult",
    "export",
    "export_bytes",
    "export_lora",
    "export_run",
    "open_learned",
    "require_exportable",
    "sample",
]

_WHERE = "where the base model is now, if it was moved: the same weights are the same model; empty: where it was"
_WHICH = "checkpoint to use: best (lowest held-out loss), or the name of one; empty: the latest"


@dataclass(frozen=True)
class SampleConfig:
    """Settings for drawing with a session's model."""

    prompt: str = option("", help="prompt: what to generate; empty: the session's own prompts")
    seed: int = option(11, help="random seed of the first image", low=0, high=2**31 - 1)
    count: int = option(4, help="number of images", low=1, high=16)
    sample_steps: int = option(25, help="denoising steps", low=1, high=200)
    guidance: float = option(
        7.5, help="guidance scale (CFG): how closely the image follows the prompt", low=0.0, high=30.0
    )
    checkpoint: str = option("", help=_WHICH, known="checkpoints")
    base_model: str = option("", help=_WHERE, advanced=True)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ExportConfig:
    """Settings for writing a session's model to one file."""

    format: Literal["safetensors", "ckpt", "lora"] = option(
        "safetensors",
        help=(
            "safetensors: single-file checkpoint (LDM keys) of the complete model; ckpt: the same as a pickle of plain "
            "tensors, for programs that read nothing else; lora: what method lora trained, with kohya's keys, for web "
            "UIs"
        ),
    )
    dtype: Literal["fp16", "bf16", "fp32"] = option("fp16", help="dtype of the weights")
    out: str = option("", help="file to write; empty: a new file in the session's exports folder")
    overwrite: bool = option(False, help="replace the file if it exists")
    checkpoint: str = option("", help=_WHICH, known="checkpoints")
    base_model: str = option("", help=_WHERE, advanced=True)

    def __post_init__(self) -> None:
        bad_name = self.out and Path(self.out).suffix != self.ending
        wanted = f"it must end in {self.ending}, because format (--format) is {self.format}"
        check(self, [f"out (--out) is {self.out!r}; {wanted}"] if bad_name else [])

    @property
    def ending(self) -> str:
        """The ending of the file's name."""
        return ".ckpt" if self.format == "ckpt" else ".safetensors"


@dataclass(frozen=True)
class SampleResult:
    """The images that were drawn."""

    path: Path  # a PNG with all of them
    prompts: tuple[str, ...]
    step: int
    stage: str


@dataclass(frozen=True)
class ExportResult:
    """The file that was written, read back and verified."""

    path: Path
    sha256: str
    bytes: int
    stage: str
    step: int


def open_learned(
    session: Session, folder: Path, checkpoint: str = "", *, base_model: str = ""
) -> tuple[TrainingContext, str, int]:
    """A context with a whole checkpoint's weights in place: (context, stage, step).

    Args:
        session: that was trained.
        folder: a local folder for copies of its files; needed only during this call.
        checkpoint: `best`, a checkpoint's name, or nothing for the newest.
        base_model: where its base model lies now; nothing for where it was. The session remembers it.

    Raises:
        SessionError: nothing was trained yet, or the session is no longer there.
        CheckpointError: there is no such checkpoint.
        ModelNotFound: the base model is not where it was.
        SettingsError: it has other weights now.
    """
    session.require_here()
    with CheckpointStore(
        session.checkpoints, scratch=folder, report=session.notices.append, timeline=str(session.record.get("run", 1))
    ) as store:
        generation, _ = store.newest()
        if generation is None:
            raise SessionError(
                f"Session {session.name} has no complete checkpoint yet.",
                f"Train it first: fastsd dreambooth train {session.name}",
            )
        choice = choose_checkpoint(store.folder, generation, checkpoint)
        generation = choice.generation
        config = from_values(ResolvedConfig, {"lora_targets": "attention", **generation.record["settings"]})
        base = find_base(generation, session, base_model, predicts=(config.prediction_type, config.zsnr))
        context = TrainingContext(base, config, describe_device())
        for stage in STAGE_NAMES:
            role = choice.role if stage == choice.stage else stage
            if role in generation.roles:
                context.trained[stage] = generation.load(role)
        context.prompts = list(generation.record["prompts"])
        context.bucket_info = generation.record.get("bucket_info") or {}
        context.prompt_of = list(range(len(context.prompts)))
    return context, choice.stage, choice.step


def sample(config: SampleConfig, session: Session) -> SampleResult:
    """Draw images with a checkpoint, by default the newest whole one; writes samples/drawn-{seed}.png.

    Args:
        config: prompt, seed, number of images and steps.
        session: one that has trained some steps.

    Returns:
        `path` of one image with all of them side by side, their prompts, and stage and step of the checkpoint.

    Raises:
        SessionError: nothing was trained yet.
        CheckpointError: there is no such checkpoint.
        ModelError: the base model is gone.
    """
    with tempfile.TemporaryDirectory() as folder:
        context, stage, step = open_learned(session, Path(folder), config.checkpoint, base_model=config.base_model)
    prompts = [config.prompt] * config.count if config.prompt else sample_prompts(context, config.count)
    asked = prompts if config.prompt else [context.as_shown(prompt) for prompt in prompts]
    vae = context.base.load("vae").to(context.device)
    seeds = [config.seed + index for index in range(len(prompts))]
    pictures = draw_with(context, vae, asked, seeds=seeds, steps=config.sample_steps, guidance=config.guidance)
    path = session.samples / f"drawn-{config.seed}.png"
    save_picture(draw_grid([pictures], [f"step {step}"], prompts), path)
    return SampleResult(path, tuple(prompts), step, stage)


def export(config: ExportConfig, session: Session) -> ExportResult:
    """Write a checkpoint, by default the newest whole one, as one verified file.

    Args:
        config: format, dtype, checkpoint and where to.
        session: one that has trained some steps.

    Returns:
        `path`, `sha256` and size of the file, and the stage and step it is of.

    Raises:
        SessionError: nothing was trained yet.
        SettingsError: there is no LoRA in it.
        CheckpointError: the file exists, or there is no such checkpoint.
        VerificationFailed: what was read back differs from what was written.
    """
    with tempfile.TemporaryDirectory() as folder:
        context, stage, step = open_learned(session, Path(folder), config.checkpoint, base_model=config.base_model)
    suffix = ("-lora" if config.format == "lora" else "") + ("" if config.dtype == "fp16" else f"-{config.dtype}")
    name = f"{session.name}-{stage}-{step}{suffix}{config.ending}"
    path = Path(config.out).expanduser().absolute() if config.out else session.exports / name
    write = export_lora if config.format == "lora" else export_run
    written = write(session, context, path, dtype=config.dtype, overwrite=config.overwrite)
    return ExportResult(path, written.sha256, written.bytes, stage, step)


# ------------------------------------------------------------------------------------------------- the file


def export_bytes(base: BaseModel, config: ResolvedConfig, stages: Collection[str], counted: Mapping[str, int]) -> int:
    """Size of the finished float16 file, from the model's configurations; with method lora of the LoRA of `stages`.

    `counted` is what `trained_count_of` said of stages already: to build a network once more takes seconds.
    """
    whole = () if config.method == "lora" else base.build_empty("vae").parameters()
    stages = stages if config.method == "lora" else STAGE_NAMES
    trained = sum(counted.get(stage) or trained_count_of(base, config, stage) for stage in stages)
    return 2 * (trained + sum(parameter.numel() for parameter in whole)) + 2**20


def require_exportable(base: BaseModel) -> None:
    """Refuse a model before it is trained whose parts fit no single-file layout; reads names and shapes only.

    Raises:
        CheckpointError: a tensor is missing, or has another shape than in the family's models.
    """
    parts = {part: base.folder / part for part in base.family.parts}
    with open_parts(find_family(base.spec.family), parts):
        pass


def _refuse_existing(dst: Path, overwrite: bool) -> None:
    if dst.exists() and not overwrite:
        raise CheckpointError(f"{dst} exists already.", "Name another file, or use --overwrite.")


def export_run(
    session: Session, context: TrainingContext, dst: Path, *, dtype: str = "fp16", overwrite: bool = False
) -> CheckpointFile:
    """Write trained and untouched parts as one file, a LoRA merged into them, put it in place and read it back.

    Raises:
        CheckpointError: `dst` exists.
        DiskFull: there is no room for it.
        DriveReadOnly: it cannot be written there.
        VerificationFailed: what was read back differs.
    """
    _refuse_existing(dst, overwrite)
    parts = context.whole_parts()
    size = context.config.resolution
    metadata = {
        "modelspec.title": session.name,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.trigger_phrase": context.prompts[0] if context.prompts else "",
    }
    family = find_family(context.base.spec.family)
    spec = context.base.spec
    predicts = Prediction(spec.prediction_type, "the base model", spec.zero_terminal_snr)
    with open_parts(family, parts) as opened:
        metadata |= prediction_metadata(family, predicts, opened.widths)
        beside = sidecar(family, predicts, opened.widths)
    scratch = dst.with_name(f".{dst.stem}.new{dst.suffix}")
    written = write_checkpoint(
        parts, scratch, family=family.key, dtype=dtype, metadata=metadata, prediction=predicts, overwrite=True
    )
    fault_point("export.written")
    try:
        verify_checkpoint(written, parts, prediction=predicts)
        if beside:  # without it AUTOMATIC1111 draws noise with a model that predicts velocity
            write_atomic(dst.with_suffix(".yaml"), beside.encode())
        scratch.replace(dst)
    finally:
        scratch.unlink(missing_ok=True)
    return replace(written, path=dst, sha256=sha256_of(dst))


def export_lora(
    session: Session, context: TrainingContext, dst: Path, *, dtype: str = "fp16", overwrite: bool = False
) -> CheckpointFile:
    """Write what method lora trained, both parts in one file, in the layout that web UIs read.

    Raises:
        SettingsError: the session was trained with method full.
        CheckpointError: `dst` exists.
        DiskFull: there is no room for it.
        DriveReadOnly: it cannot be written there.
        VerificationFailed: what was read back differs.
    """
    config, spec = context.config, context.base.spec
    if config.method != "lora":
        raise SettingsError(
            f"Session {session.name} was trained with method full: there is no LoRA in it.",
            "Export the whole model (--format safetensors), or train with --method lora.",
        )
    _refuse_existing(dst, overwrite)
    return write_lora_file(
        dst,
        context.trained_parts(),
        spec=spec,
        alpha=config.lora_alpha,
        px=config.resolution,
        dtype=dtype,
        bucket_info=context.bucket_info,
    )
