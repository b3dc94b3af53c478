"""The end of a run: samples, before and after, the verified checkpoint file and its model card."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.checkpoints import verify_checkpoint, write_checkpoint
from fastsd_helpers.checkpoints.families import find_family
from fastsd_helpers.checkpoints.parts import open_parts
from fastsd_helpers.checkpoints.prediction import Prediction, prediction_metadata, sidecar
from fastsd_helpers.dreambooth.base_model import BaseModel
from fastsd_helpers.dreambooth.cache import encode_prompts
from fastsd_helpers.dreambooth.curves import plot_losses
from fastsd_helpers.dreambooth.lora import kohya_metadata, kohya_tensors, write_lora_file
from fastsd_helpers.dreambooth.picture_budget import FULL, Drawing, Teller
from fastsd_helpers.dreambooth.sampling import draw_grid, draw_pictures, save_picture
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.dreambooth.stages import Job, Studio
from fastsd_helpers.errors import CheckpointError, SettingsError
from fastsd_helpers.files import sha256_of, write_atomic
from fastsd_helpers.options import to_values
from fastsd_helpers.runtime import fault_point, versions
from fastsd_helpers.sessions import Session

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastsd_helpers.dreambooth.resume import CheckpointStore

__all__ = [
    "Written",
    "draw_sample",
    "export_bytes",
    "export_lora",
    "export_run",
    "finish_run",
    "finished_result",
    "require_exportable",
    "require_room",
    "run_label",
    "sample_prompts",
]

_SAMPLE_SEEDS = (11, 12, 13, 14)


@dataclass(frozen=True)
class Written:
    """A finished file that was read back and verified."""

    path: Path
    bytes: int
    tensors: int
    sha256: str


def export_bytes(base: BaseModel, studio: Studio) -> int:
    """Size of the finished float16 file, from the model's configurations; of the LoRA alone with method lora."""
    import torch
    from diffusers import AutoencoderKL

    if studio.config.method == "lora":
        return 2 * sum(studio.trained_count_of(part) for part in ("unet", "text_encoder")) + 2**20
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(base.folder, subfolder="vae"))
    counts = [studio.count_of(part) for part in ("unet", "text_encoder")]
    return 2 * (sum(counts) + sum(parameter.numel() for parameter in vae.parameters())) + 2**20


def require_exportable(base: BaseModel) -> None:
    """Refuse a model before it is trained whose parts fit no single-file layout; reads names and shapes only.

    Raises:
        CheckpointError: a tensor is missing, or has another shape than in the family's models.
    """
    parts = {part: base.folder / part for part in ("unet", "text_encoder", "vae")}
    with open_parts(find_family(base.spec.family), parts):
        pass


def require_room(store: "CheckpointStore", needed: int) -> None:
    """Refuse to write the finished file onto a Drive that has not surely room for it: it would be lost without a word.

    Raises:
        DiskFull: with what to do; the training is complete, so going on makes the file alone.
    """
    then = (
        "Then train again with the same session: the steps are done, so only the file is written. Or write it to this "
        "machine's disk: fastsd dreambooth export, with --out."
    )
    store.require_room(needed, what="the finished file", then=then)


def draw_sample(session: Session, studio: Studio, job: Job, step: int, drawing: Drawing = FULL) -> Path:
    """Draw the training prompts with the model as it is; writes samples/{stage}-{step}.png."""
    import torch

    prompts = sample_prompts(studio, drawing.pictures)
    with job.shown(), studio.autocast(), torch.no_grad():
        text = job.text_for([studio.prompts.index(prompt) for prompt in prompts]).float()
    vae = studio.base.load_vae().to(studio.device)
    with job.shown(), studio.autocast():
        pictures = draw_pictures(
            studio.base,
            job.unet,
            vae,
            text,
            studio.empty_text().to(text),
            size=studio.config.resolution,
            seeds=_SAMPLE_SEEDS[: len(prompts)],
            device=studio.device,
            **_steps_of(drawing),
        )
    path = session.samples / f"{job.stage}-{step:06d}.png"
    save_picture(draw_grid([pictures], [f"step {step}"], prompts), path)
    return path


def sample_prompts(studio: Studio, count: int = len(_SAMPLE_SEEDS)) -> list[str]:
    """Up to four different training prompts; one prompt alone is drawn with four seeds."""
    prompts = list(dict.fromkeys(studio.prompts[index] for index in studio.prompt_of))
    if len(prompts) <= count:
        return (prompts * count)[:count] if len(prompts) == 1 else prompts
    # Spread over all of them: with several subjects the first few prompts are all of the first one.
    return [prompts[index * len(prompts) // count] for index in range(count)]


def _steps_of(drawing: Drawing) -> dict[str, Any]:
    return {} if drawing.steps == FULL.steps else {"steps": drawing.steps}


def draw_before_and_after(
    session: Session, studio: Studio, label: str, say: "Callable[[str], None]", drawing: Drawing = FULL
) -> Path:
    """The same prompts and seeds with the base model and with the trained one; writes samples/before-after*.png."""
    prompts = sample_prompts(studio, drawing.pictures)
    pictures = "one image" if len(prompts) == 1 else f"{len(prompts)} images"
    say(f"Generating images before and after: {pictures} each, {drawing.steps} denoising steps ...")
    teller = Teller(say, "before and after", 2 * drawing.steps)
    vae = studio.base.load_vae().to(studio.device)
    rows = []
    trained, nothing = studio.trained, dict.fromkeys(studio.trained)
    for weights in (nothing, trained):
        studio.trained = weights
        text_encoder = studio.load_text_encoder()
        text = encode_prompts(text_encoder, studio.tokenizer, [*prompts, ""], device=studio.device)
        del text_encoder
        unet = studio.load_unet()
        with studio.autocast():
            rows.append(
                draw_pictures(
                    studio.base,
                    unet,
                    vae,
                    text[:-1],
                    text[-1:],
                    size=studio.config.resolution,
                    seeds=_SAMPLE_SEEDS[: len(prompts)],
                    device=studio.device,
                    after_step=teller,
                    **_steps_of(drawing),
                )
            )
        del unet
    path = session.samples / f"before-after{label}.png"
    save_picture(draw_grid(rows, ["before", "after"], prompts), path)
    return path


def export_run(
    session: Session, studio: Studio, dst: Path, *, dtype: str = "fp16", title: str = "", overwrite: bool = False
) -> Written:
    """Write trained and untouched parts as one file, a LoRA merged into them, put it in place and read it back.

    Raises:
        CheckpointError: `dst` exists. DiskFull, DriveReadOnly. VerificationFailed: what was read back differs.
    """
    if dst.exists() and not overwrite:
        raise CheckpointError(f"{dst} exists already.", "Name another file, or use --overwrite.")
    parts = studio.whole_parts()
    parts["vae"] = studio.base.folder / "vae"
    size = studio.config.resolution
    metadata = {
        "modelspec.title": title or session.name,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.trigger_phrase": studio.prompts[0] if studio.prompts else "",
    }
    family = find_family(studio.base.spec.family)
    predicts = Prediction(studio.base.spec.prediction_type, "the base model")
    with open_parts(family, parts) as opened:
        metadata |= prediction_metadata(family, predicts, opened.widths)
        beside = sidecar(family, predicts, opened.widths)
    scratch = dst.with_name(f".{dst.stem}.new{dst.suffix}")
    written = write_checkpoint(parts, scratch, family=family.key, dtype=dtype, metadata=metadata, overwrite=True)
    fault_point("export.written")
    try:
        verify_checkpoint(written, parts)
        if beside:  # without it AUTOMATIC1111 draws noise with a model that predicts velocity
            write_atomic(dst.with_suffix(".yaml"), beside.encode())
        scratch.replace(dst)
    finally:
        scratch.unlink(missing_ok=True)
    return Written(dst, written.bytes, written.tensors, sha256_of(dst))


def export_lora(
    session: Session, studio: Studio, dst: Path, *, dtype: str = "fp16", overwrite: bool = False
) -> Written:
    """Write what method lora trained, both parts in one file, in the layout that web UIs read.

    Raises:
        SettingsError: the session was trained with method full. CheckpointError: `dst` exists.
        DiskFull, DriveReadOnly. VerificationFailed: what was read back differs.
    """
    config, spec = studio.config, studio.base.spec
    if config.method != "lora":
        raise SettingsError(
            f"Session {session.name} was trained with method full: there is no LoRA in it.",
            "Export the whole model (--format safetensors), or train with --method lora.",
        )
    if dst.exists() and not overwrite:
        raise CheckpointError(f"{dst} exists already.", "Name another file, or use --overwrite.")
    tensors = kohya_tensors(studio.trained, family=spec.family, alpha=config.lora_alpha, dtype=dtype)
    metadata = kohya_metadata(
        name=dst.stem,
        family=spec.family,
        prediction_type=spec.prediction_type,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        px=config.resolution,
    )
    sha256 = write_lora_file(dst, tensors, metadata)
    return Written(dst, dst.stat().st_size, len(tensors), sha256)


def run_label(run: int, more: int) -> str:
    """What tells a run's files from those of the session's earlier runs, and from those before it was lengthened."""
    return ("" if run == 1 else f"-run{run}") + (f"-more{more}" if more else "")


def finished_result(session: Session, run: int, *, more: int | None = None) -> dict[str, Any] | None:
    """What a finished run made, when all of it is still there and whole.

    Args:
        session: with its record.
        run: the run's number.
        more: how often the run must have been lengthened by then; None takes what there is.
    """
    result = session.record.get("result")
    if not result or result.get("run") != run or more not in (None, result.get("more", 0)):
        return None
    paths = {name: session.folder / result[name] for name in ("path", "grid", "loss_plot", "model_card")}
    if not all(path.is_file() for path in paths.values()) or sha256_of(paths["path"]) != result["sha256"]:
        return None
    rest = {name: result[name] for name in ("sha256", "loss_before", "loss_after")}
    return {**paths, **rest}


def finish_run(
    session: Session,
    base: BaseModel,
    studio: Studio,
    config: DreamBoothConfig,
    *,
    history: dict[str, Any],
    held_out: list[list],
    run: int,
    more: int,
    judged_from: int = 0,
    drawing: Drawing = FULL,
    say: "Callable[[str], None]",
) -> dict[str, Any]:
    """Make the images, the file and the card; the session records them only when the file was read back."""
    label = run_label(run, more)
    grid = draw_before_and_after(session, studio, label, say, drawing)
    loss_plot = plot_losses(history, held_out, session.logs / f"loss{label}.png", label=studio.held_out_label)
    write = export_lora if config.method == "lora" else export_run
    suffix = "-lora" if config.method == "lora" else ""
    written = write(session, studio, session.exports / f"{session.name}{label}{suffix}.safetensors", overwrite=True)
    path, sha256 = written.path, written.sha256
    losses = {"loss_before": held_out[judged_from][1], "loss_after": held_out[-1][1]}
    card = session.exports / f"README{label}.md"
    shutil.copyfile(grid, session.exports / grid.name)
    write_atomic(card, _card(session, base, studio, config, path, sha256, losses, grid.name).encode())
    made = {"path": path, "grid": grid, "loss_plot": loss_plot, "model_card": card}
    relative = {name: str(file.relative_to(session.folder)) for name, file in made.items()}
    judged = {"judged_on": studio.held_out_label}
    session.save(result={"run": run, "more": more, "sha256": sha256, **losses, **judged, **relative})
    say(f"DONE: {path} was read back and verified ({written.tensors} tensors, sha256 {sha256[:12]}...).")
    return {**made, "sha256": sha256, **losses}


def _public_name(base: BaseModel) -> str:
    """What others may call the base model: of a folder or file its own name, not where it lies on this machine."""
    local = Path(base.ref).expanduser()
    return local.resolve().name if local.is_absolute() or local.exists() else base.ref


def _card(
    session: Session,
    base: BaseModel,
    studio: Studio,
    config: DreamBoothConfig,
    path: Path,
    sha256: str,
    losses: dict[str, float],
    grid: str,
) -> str:
    """A model card in the Hub's format: front matter, then what a reader needs to use and judge the model."""
    before, after = losses["loss_before"], losses["loss_after"]
    judged = f"{before:.4f} before, {after:.4f} after ({100 * (1 - after / before):.1f} % lower)"
    prompts = "\n".join(f"- `{prompt}`" for prompt in studio.prompts)
    values = to_values(config) | {"base_model": _public_name(base)}
    settings = "\n".join(f"| {name} | {value} |" for name, value in values.items())
    front = {
        "license": base.spec.licence,
        "base_model": _public_name(base),
        "tags": ["dreambooth", "stable-diffusion", "text-to-image"],
    }
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    library = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"""---
{head}
---
# {session.name}

{base.spec.title}, fine-tuned on a new subject with DreamBooth.

![before and after]({grid})

| | |
| --- | --- |
| file | `{path.name}` |
| sha256 | `{sha256}` |
| held-out loss ({studio.held_out_label}) | {judged} |

## Instance prompts
{prompts}

## Settings
| setting | value |
| --- | --- |
{settings}

Made with {library}.
"""
