"""`fastsd demo`: complete DreamBooth example on the embedded model, with images; no GPU, no network."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from fastsd_helpers import demo
from fastsd_helpers.dreambooth import DreamBoothConfig, PrepareConfig, prepare, train
from fastsd_helpers.errors import DriveError
from fastsd_helpers.runtime import logger
from fastsd_helpers.sessions import Session

__all__ = ["DemoResult", "run_demo"]

_SUBJECT = "robot"
_SIZE_PX = 128


@dataclass(frozen=True)
class DemoResult:
    """Where everything is that the demo made."""

    path: Path  # the finished .safetensors, read back and verified
    sha256: str
    grid: Path
    loss_plot: Path
    model_card: Path
    session: Path
    loss_before: float
    loss_after: float
    seconds: float
    next_steps: tuple[str, ...]


def run_demo(out: Path | str = "demo-output") -> DemoResult:
    """Teach the embedded model a robot from six images, and keep every step of it in `out`.

    Killed and started again, it goes on where it was; finished, it returns at once. Writes a session folder, and the
    grid, the plot, the checkpoint file and its card beside it.

    Args:
        out: the folder, made when it is absent.

    Returns:
        Where grid, plot, file and card are, and the held-out loss before and after.

    Raises:
        DriveError: `out` is not a folder that can be written to.
    """
    out = Path(out).absolute()
    if out.exists() and not out.is_dir():
        raise DriveError(f"{out} is a file.", "Name a folder: fastsd demo --out FOLDER")
    root = out / "sessions"
    session = Session.open(_SUBJECT, root=root) if (root / _SUBJECT).is_dir() else Session.create(_SUBJECT, root=root)
    if not (session.record.get("dataset") or {}).get("images"):
        photos = PrepareConfig(
            images=str(demo.SUBJECTS_FOLDER / _SUBJECT),
            held_out=str(demo.SUBJECTS_FOLDER / "held_out" / _SUBJECT),
            size=_SIZE_PX,
        )
        logger.info("1 of 3: six images of a %s are cropped, captioned and checked.", _SUBJECT)
        prepare(photos, session)
    logger.info("2 of 3: the text encoder is trained on the new words, then the U-Net on the %s.", _SUBJECT)
    result = train(DreamBoothConfig(base_model="demo"), session)
    logger.info("3 of 3: the images, the loss plot, the file and its model card are collected in %s.", out)
    placed = {
        "path": out / "robot.safetensors",
        "grid": out / "before-after.png",
        "loss_plot": out / "loss.png",
        "model_card": out / "README.md",
    }
    for name, target in placed.items():
        shutil.copyfile(getattr(result, name), target)
    lower = 100 * (1 - result.loss_after / result.loss_before)
    return DemoResult(
        **placed,
        sha256=result.sha256,
        session=session.folder,
        loss_before=result.loss_before,
        loss_after=result.loss_after,
        seconds=result.seconds,
        next_steps=(
            f"Look at {placed['grid']}: same prompts and seeds, before and after (held-out loss {lower:.0f} % lower).",
            f"Generate more: fastsd dreambooth sample {_SUBJECT} --root {root} --prompt 'a zib robot at the top'",
            "Fine-tune it on your own images: fastsd dreambooth new mine, then prepare mine --images FOLDER --size "
            "128, then train mine --base-model demo",
        ),
    )
