"""The loss plot and the TensorBoard log of a run."""

import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.files import placed, write_atomic

if TYPE_CHECKING:
    import torch

__all__ = ["BoardLog", "plot_losses"]

_COLOURS = {"text_encoder": "tab:orange", "unet": "tab:blue"}


def plot_losses(history: "dict[str, torch.Tensor]", held_out: list[list], path: Path, *, label: str) -> Path:
    """Draw every step's loss, its running mean, and the held-out loss; writes a PNG.

    Args:
        history: stage -> float32 [steps], one loss a step, in the order in which they were trained; of a later
            segment "unet 2" and so on.
        held_out: [position, loss] pairs, positions counted over both stages.
        label: which images the held-out loss is of.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    start = 0
    for name, values in history.items():
        losses = values.tolist()
        if not losses:
            continue
        stage, _, segment = name.partition(" ")
        colour = _COLOURS[stage]
        # A later part of the run has the colour of its stage, and one line of the legend is enough for both.
        mean = f"{stage.replace('_', ' ')}: running mean" if not segment else None
        steps = list(range(start + 1, start + len(losses) + 1))
        if segment:
            axes.axvline(start + 0.5, color="grey", linewidth=0.8, linestyle=":")
        axes.plot(steps, losses, color=colour, alpha=0.18, linewidth=0.8)
        axes.plot(steps, _smooth(losses), color=colour, label=mean)
        start += len(losses)
    if held_out:
        axes.plot([row[0] for row in held_out], [row[1] for row in held_out], "k.-", label=f"held-out loss ({label})")
    axes.set(xlabel="optimizer step", ylabel="loss (mean squared error of the predicted noise)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    write_atomic(path, data.getvalue())
    return path


def _smooth(losses: list[float]) -> list[float]:
    weight = max(0.8, 1 - 10 / len(losses))
    mean, out = losses[0], []
    for loss in losses:
        mean = weight * mean + (1 - weight) * loss
        out.append(mean)
    return out


class BoardLog:
    """TensorBoard events, written to a local folder and handed over as closed files.

    An event file that is open for hours on a mounted Drive may never arrive there; closed ones under new names do.
    """

    def __init__(self, local: Path, folder: Path) -> None:
        self._local, self._folder = local, folder
        self._writer: Any = None

    def add(self, name: str, value: float, position: int) -> None:
        """Log one scalar at an optimizer step counted over both stages; nothing when TensorBoard is not installed."""
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._local.mkdir(parents=True, exist_ok=True)
            self._writer = SummaryWriter(str(self._local))
        self._writer.add_scalar(name, value, position)

    def hand_over(self) -> None:
        """Close what is open and move it to the session's logs."""
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        self._folder.mkdir(parents=True, exist_ok=True)
        for events in sorted(self._local.glob("events.*")):
            target = self._folder / events.name
            with placed(target) as unfinished:
                shutil.copyfile(events, unfinished)
            events.unlink()
