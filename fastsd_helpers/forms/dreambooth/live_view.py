"""The live view of a training: progress with the time left, loss curve, newest samples, memory, and Stop."""

import html
import time
from collections.abc import Mapping
from pathlib import Path

from fastsd_helpers.dreambooth.running.live import Live
from fastsd_helpers.forms.widgets.loss_curve import draw_loss_curve
from fastsd_helpers.forms.widgets.view import draw_picture, in_words, load_widgets
from fastsd_helpers.forms.widgets.work_view import WorkView

__all__ = ["LiveView"]

_STAGES = {"text_encoder": "Text encoder", "unet": "U-Net"}
_WIDEST_PX = 1024
_STARTING = "Starting the training…"


class LiveView(WorkView):
    """Widgets that show a training; `show_run` brings them up to date."""

    def __init__(self) -> None:
        widgets = load_widgets()
        layout = widgets.Layout
        self._facts, self._curve, self._sample_title = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self._sample = widgets.HTML(layout=layout(display="none", max_width="512px"))
        pictures = widgets.VBox([self._sample_title, self._sample])
        middle = widgets.HBox([self._curve, pictures], layout=layout(align_items="flex-start"))
        saves = "Finishes the step, then saves a checkpoint."
        super().__init__(_STARTING, "steps of the training", saves=saves, middle=[self._facts, middle])
        self._shown_sample: tuple[str, int] | None = None
        self._drawn = False
        self._last_curve = 0.0

    def show_run(
        self, live: Live, steps: Mapping[str, int], samples: Path, *, processes: int = 1, force: bool = False
    ) -> None:
        """Show where the run is.

        Args:
            live: what it says about itself.
            steps: stage -> steps that are planned; empty while that is not known.
            samples: folder with the images it draws.
            processes: how many share it.
            force: draw the curve now, however short ago the last time was.
        """
        known = [stage for stage in _STAGES if steps.get(stage)]
        done, total = self._bar.done, self._bar.total
        if live.stage:
            steps = {live.stage: live.steps} if live.stage not in known else steps
            before = sum(steps[stage] for stage in known[: known.index(live.stage)]) if live.stage in known else 0
            done, total = before + live.step, sum(steps.values())
        self.show(self._where(live, known, steps), done, total, messages=live.messages)
        self._facts.value = _facts(live, processes)
        if force or time.monotonic() - self._last_curve > 1:
            if any(live.losses.values()):
                self._curve.value = draw_loss_curve(live.losses, steps)
                self._drawn = True
            self._show_sample(samples)
            self._last_curve = time.monotonic()

    @staticmethod
    def _where(live: Live, known: list[str], steps: Mapping[str, int]) -> str:
        if not live.stage:
            return "Loading the model and the images…" if live.process else _STARTING
        last = not known or live.stage == known[-1]
        if live.step >= live.steps:
            if last:
                return "All steps are done: generating images before and after, writing the file and verifying it…"
            return f"{_STAGES[live.stage]} is trained; {_STAGES[known[-1]]} is next…"
        part = (
            f" (part {known.index(live.stage) + 1} of {len(known)})" if live.stage in known and len(known) > 1 else ""
        )
        left = f", about {in_words(live.seconds_left)} left" if live.seconds_left is not None else ""
        in_part = " in this part" if left and not last else ""
        return f"{_STAGES[live.stage]}{part}: step {live.step} of {live.steps}{left}{in_part}"

    def _show_sample(self, samples: Path) -> None:
        newest, stamp = None, 0
        try:
            for path in samples.glob("*.png"):
                if (changed := path.stat().st_mtime_ns) > stamp:
                    newest, stamp = path, changed
            if newest is None or (newest.name, stamp) == self._shown_sample:
                return
            self._sample.value = draw_picture(newest, f"images generated at {newest.stem}", _WIDEST_PX)
        except OSError:  # the mount is busy: the next look finds it
            return
        if "<img" not in self._sample.value:  # half written
            return
        self._shown_sample = (newest.name, stamp)
        self._sample.layout.display = ""
        self._sample_title.value = f"<span class='fastsd-quiet'>latest images: {html.escape(newest.stem)}</span>"

    def end(self, text: str, *, good: bool, keep: bool = True) -> None:
        """Show how it ended; what it said last stays, such as which checkpoint was better than the end."""
        super().end(text, good=good, keep=keep)

    def show_plot(self, plot: Path | None) -> None:
        """Show the image of the losses in the session where this view has drawn none itself."""
        if not self._drawn and plot is not None and plot.is_file():
            self._curve.value = draw_picture(plot, "the losses of the entire run", _WIDEST_PX, style="max-width:640px")


def _facts(live: Live, processes: int) -> str:
    facts = []
    if points := live.losses.get(live.stage):
        recent = [loss for _, loss in points[-20:]]
        facts.append(f"loss {sum(recent) / len(recent):.4f}")
    if live.gpu_bytes:
        facts.append(f"GPU memory {live.gpu_bytes / 2**30:.1f} GiB at most")
    if live.host_bytes:
        facts.append(f"memory {live.host_bytes / 2**30:.1f} GiB at most")
    if processes > 1:
        facts.append(f"{processes} processes")
    if live.began and live.process:
        facts.append(f"running for {in_words(max(0.0, time.time() - live.began))}")
    return f"<span class='fastsd-quiet'>{' &nbsp;·&nbsp; '.join(facts)}</span>"
