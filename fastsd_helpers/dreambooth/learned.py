"""What a session has learned so far: draw with it, or write it to a file, without training."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsd_helpers.dreambooth import finish
from fastsd_helpers.dreambooth.base_model import BaseModel
from fastsd_helpers.dreambooth.cache import encode_prompts
from fastsd_helpers.dreambooth.resume import CheckpointStore
from fastsd_helpers.dreambooth.sampling import draw_grid, draw_pictures, save_picture
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.dreambooth.stages import STAGES, Studio
from fastsd_helpers.errors import SessionError
from fastsd_helpers.options import check, from_values, option
from fastsd_helpers.runtime import describe_device
from fastsd_helpers.sessions import Session

__all__ = ["ExportConfig", "ExportResult", "SampleConfig", "SampleResult", "export", "sample"]


@dataclass(frozen=True)
class SampleConfig:
    """Settings for drawing with a session's model."""

    prompt: str = option("", help="what to draw; empty: the session's own prompts")
    seed: int = option(11, help="noise the first picture starts from", low=0, high=2**31 - 1)
    count: int = option(4, help="pictures", low=1, high=16)
    sample_steps: int = option(25, help="denoising steps", low=1, high=200)
    guidance: float = option(7.5, help="how strongly the prompt steers", low=0.0, high=30.0)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ExportConfig:
    """Settings for writing a session's model to one file."""

    format: Literal["safetensors"] = option("safetensors", help="file format")
    dtype: Literal["fp16", "bf16", "fp32"] = option("fp16", help="number format of the weights")
    out: str = option("", help="file to write; empty: a new file in the session's exports folder")
    overwrite: bool = option(False, help="replace the file if it exists")

    def __post_init__(self) -> None:
        bad_name = self.out and Path(self.out).suffix != ".safetensors"
        check(self, [f"out (--out) is {self.out!r}; it must end in .safetensors"] if bad_name else [])


@dataclass(frozen=True)
class SampleResult:
    """The pictures that were drawn."""

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


def _open_learned(session: Session, folder: Path) -> tuple[Studio, str, int]:
    """A studio with the newest whole checkpoint's weights in place."""
    with CheckpointStore(
        session.checkpoints, scratch=folder, report=session.notices.append, timeline=str(session.record.get("run", 1))
    ) as store:
        generation, _ = store.newest()
        if generation is None:
            raise SessionError(
                f"Session {session.name} has no whole checkpoint yet.",
                f"Train it first: fastsd dreambooth train {session.name}",
            )
        config = from_values(DreamBoothConfig, generation.record["settings"])
        studio = Studio(BaseModel.fetch(config.base_model), config, describe_device())
        for stage in STAGES:
            if stage.name in generation.roles:
                studio.trained[stage.name] = generation.load(stage.name)
        studio.prompts = list(generation.record["prompts"])
        studio.prompt_of = list(range(len(studio.prompts)))
    return studio, generation.stage, generation.step


def sample(config: SampleConfig, session: Session) -> SampleResult:
    """Draw pictures with the newest whole checkpoint; writes samples/drawn-{seed}.png.

    Raises:
        SessionError: nothing was trained yet. ModelError: the base model is gone.
    """
    with tempfile.TemporaryDirectory() as folder:
        studio, stage, step = _open_learned(session, Path(folder))
    prompts = [config.prompt] * config.count if config.prompt else finish.sample_prompts(studio, config.count)
    text_encoder = studio.load_text_encoder()
    text = encode_prompts(text_encoder, studio.tokenizer, [*prompts, ""], device=studio.device)
    vae = studio.base.load_vae().to(studio.device)
    with studio.autocast():
        pictures = draw_pictures(
            studio.base,
            studio.load_unet(),
            vae,
            text[:-1],
            text[-1:],
            size=studio.config.resolution,
            seeds=[config.seed + index for index in range(len(prompts))],
            steps=config.sample_steps,
            guidance=config.guidance,
            device=studio.device,
        )
    path = session.samples / f"drawn-{config.seed}.png"
    save_picture(draw_grid([pictures], [f"step {step}"], prompts), path)
    return SampleResult(path, tuple(prompts), step, stage)


def export(config: ExportConfig, session: Session) -> ExportResult:
    """Write the newest whole checkpoint as one verified file.

    Raises:
        SessionError: nothing was trained yet. CheckpointError: the file exists. VerificationFailed.
    """
    with tempfile.TemporaryDirectory() as folder:
        studio, stage, step = _open_learned(session, Path(folder))
    suffix = "" if config.dtype == "fp16" else f"-{config.dtype}"
    name = f"{session.name}-{stage}-{step}{suffix}.safetensors"
    path = Path(config.out).expanduser().absolute() if config.out else session.exports / name
    written, sha256 = finish.export_run(session, studio, path, dtype=config.dtype, overwrite=config.overwrite)
    return ExportResult(path, sha256, written.bytes, stage, step)
