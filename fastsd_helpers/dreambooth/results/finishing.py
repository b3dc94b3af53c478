"""The end of a run: samples, before and after, the verified checkpoint file and its model card."""

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.dreambooth.results import learned
from fastsd_helpers.dreambooth.results.curves import plot_losses
from fastsd_helpers.dreambooth.results.image_budget import FULL, Drawing, PictureBudget, Teller
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.dreambooth.training.base_model import BaseModel
from fastsd_helpers.dreambooth.training.sampling import (
    draw_grid,
    draw_pictures,
    draw_with,
    sample_prompts,
    save_picture,
)
from fastsd_helpers.dreambooth.training.stages import StageTrainer, TrainingContext
from fastsd_helpers.errors import Interrupted
from fastsd_helpers.files import sha256_of, write_atomic
from fastsd_helpers.options import to_values
from fastsd_helpers.runtime import versions
from fastsd_helpers.sessions import Session

if TYPE_CHECKING:
    from fastsd_helpers.dreambooth.resume import CheckpointStore

__all__ = ["Samples", "TrainResult", "draw_sample", "finish_run", "finished_result", "require_room"]

_SAMPLE_SEEDS = (11, 12, 13, 14)


@dataclass(frozen=True)
class TrainResult:
    """What a finished run made."""

    path: Path  # the finished .safetensors, read back and verified
    sha256: str
    grid: Path  # before and after, same seeds
    loss_plot: Path
    model_card: Path
    loss_before: float  # held-out loss of the base model
    loss_after: float
    first_step: int  # steps that were already done when this call began
    steps: int
    seconds: float
    best_checkpoint: str | None = None  # its name, when an earlier one has a lower held-out loss than the end


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


class Samples:
    """The sample images of a run, drawn between its steps.

    Args:
        session: of the run.
        context: of the run.
        budget: what its time allows.
        asked: they were asked for, so they are drawn in full.
        say: gets a sentence for the user.

    Attributes:
        owed: whether a stop cut those of the last step short, so that the run that resumes draws them.
    """

    def __init__(
        self,
        session: Session,
        context: TrainingContext,
        budget: PictureBudget,
        *,
        asked: bool,
        say: Callable[[str], None],
    ) -> None:
        self._session, self._context, self._budget, self._asked, self._say = session, context, budget, asked, say
        self._said_none = False
        self.owed = False

    def draw(self, trainer: StageTrainer, step: int, stopped: Callable[[], bool]) -> None:
        """Draw with the model as it is after a step; what `stopped` cuts short is owed."""
        drawing = FULL if self._asked else self._budget.sample()
        if drawing is not None:
            self.owed = True
            with contextlib.suppress(Interrupted):  # the loop asks too, and saves: with all processes together
                draw_sample(self._session, self._context, trainer, step, drawing, stopped=stopped)
                self.owed = False
        elif not self._said_none:
            self._said_none = True
            self._say("No sample images during training: generating them would take longer than this short training.")


def draw_sample(
    session: Session,
    context: TrainingContext,
    trainer: StageTrainer,
    step: int,
    drawing: Drawing = FULL,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Path:
    """Draw the training prompts with the model as it is; writes samples/{stage}-{step}.png.

    Raises:
        Interrupted: `stopped` said so; nothing is written.
    """
    import torch

    prompts = sample_prompts(context, drawing.pictures)
    vae = context.base.load("vae").to(context.device)
    with trainer.shown(), context.autocast():
        with torch.no_grad():
            text = trainer.text_for([context.texts.index(context.as_shown(prompt)) for prompt in prompts]).float()
        pictures = draw_pictures(
            context.base,
            trainer.unet,
            vae,
            text,
            context.empty_text().to(context.device),
            size=context.config.resolution,
            seeds=_SAMPLE_SEEDS[: len(prompts)],
            steps=drawing.steps,
            device=context.device,
            stopped=stopped,
        )
    path = session.samples / f"{trainer.stage}-{step:06d}.png"
    save_picture(draw_grid([pictures], [f"step {step}"], prompts), path)
    return path


def draw_before_and_after(
    session: Session,
    context: TrainingContext,
    label: str,
    say: Callable[[str], None],
    drawing: Drawing = FULL,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Path:
    """The same prompts and seeds with the base model and with the trained one; writes samples/before-after*.png.

    Raises:
        Interrupted: `stopped` said so; nothing is written.
    """
    prompts = sample_prompts(context, drawing.pictures)
    pictures = "one image" if len(prompts) == 1 else f"{len(prompts)} images"
    say(f"Generating images before and after: {pictures} each, {drawing.steps} denoising steps ...")
    options = {
        "seeds": _SAMPLE_SEEDS[: len(prompts)],
        "steps": drawing.steps,
        "after_step": Teller(say, "before and after", 2 * drawing.steps),
        "stopped": stopped,
    }
    vae = context.base.load("vae").to(context.device)
    asked, rows = [context.as_shown(prompt) for prompt in prompts], []
    for weights in (dict.fromkeys(context.trained), context.trained):
        context.trained = weights
        rows.append(draw_with(context, vae, asked, **options))
    path = session.samples / f"before-after{label}.png"
    save_picture(draw_grid(rows, ["before", "after"], prompts), path)
    return path


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
    context: TrainingContext,
    config: DreamBoothConfig,
    *,
    history: dict[str, Any],
    held_out: list[list],
    run: int,
    more: int,
    judged_from: int = 0,
    drawing: Drawing = FULL,
    say: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Make the images, the file and the card; the session records them only when the file was read back.

    Raises:
        Interrupted: `stopped` said so while the images were generated. The steps are done and saved.
    """
    label = run_label(run, more)
    try:
        grid = draw_before_and_after(session, context, label, say, drawing, stopped=stopped)
    except Interrupted as err:
        problem = "Stopped after the last step, while the images before and after were generated; everything is saved."
        raise Interrupted(problem, err.hint) from None
    loss_plot = plot_losses(history, held_out, session.logs / f"loss{label}.png", label=context.held_out_label)
    write = learned.export_lora if config.method == "lora" else learned.export_run
    suffix = "-lora" if config.method == "lora" else ""
    written = write(session, context, session.exports / f"{session.name}{label}{suffix}.safetensors", overwrite=True)
    path, sha256 = written.path, written.sha256
    losses = {"loss_before": held_out[judged_from][1], "loss_after": held_out[-1][1]}
    card = session.exports / f"README{label}.md"
    shutil.copyfile(grid, session.exports / grid.name)
    write_atomic(card, _card(session, base, context, config, path, sha256, losses, grid.name).encode())
    made = {"path": path, "grid": grid, "loss_plot": loss_plot, "model_card": card}
    relative = {name: str(file.relative_to(session.folder)) for name, file in made.items()}
    judged = {"judged_on": context.held_out_label}
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
    context: TrainingContext,
    config: DreamBoothConfig,
    path: Path,
    sha256: str,
    losses: dict[str, float],
    grid: str,
) -> str:
    """A model card in the Hub's format: front matter, then what a reader needs to use and judge the model."""
    before, after = losses["loss_before"], losses["loss_after"]
    judged = f"{before:.4f} before, {after:.4f} after ({100 * (1 - after / before):.1f} % lower)"
    prompts = "\n".join(f"- `{prompt}`" for prompt in context.prompts)
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
| held-out loss ({context.held_out_label}) | {judged} |

## Instance prompts
{prompts}

## Settings
| setting | value |
| --- | --- |
{settings}

Made with {library}.
"""
