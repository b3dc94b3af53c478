"""The live view of a training: progress with the time left, loss curve, newest samples, memory, and Stop."""

import html
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsd_helpers.dreambooth.live import Live
from fastsd_helpers.forms.loss_curve import draw_loss_curve
from fastsd_helpers.forms.view import Bar, View, draw_picture, load_widgets, make_button, make_frame
from fastsd_helpers.wording import for_notebook

__all__ = ["LiveView", "in_words"]

_STAGES = {"text_encoder": "Text encoder", "unet": "U-Net"}
_WIDEST_PX = 1024
_MESSAGES = 4


def in_words(seconds: float) -> str:
    """A length of time as people say it: "40 s", "12 min", "1 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class LiveView(View):
    """Widgets that show a training; `show` brings them up to date.

    Attributes:
        stop_clicks: how often the Stop button was pressed.
    """

    def __init__(self) -> None:
        widgets = load_widgets()
        layout = widgets.Layout
        self.stop_clicks = 0
        self._head = widgets.HTML("<b>Starting the training…</b>")
        self._bar = Bar("steps of the training")
        self._bar.widget.layout = layout(flex="1 1 220px", max_width="420px")
        self._button = make_button("Stop", icon="stop", kind="warning", name="fastsd-stop")
        self._button.on_click(self._on_stop)
        self._facts = widgets.HTML()
        self._curve = widgets.HTML()
        self._sample_title = widgets.HTML()
        self._sample = widgets.HTML(layout=layout(display="none", max_width="512px"))
        self._messages = widgets.HTML()
        row = widgets.HBox([self._bar.widget, self._button], layout=layout(align_items="center"))
        pictures = widgets.VBox([self._sample_title, self._sample])
        middle = widgets.HBox([self._curve, pictures], layout=layout(align_items="flex-start"))
        self.box = make_frame(self._head, row, self._facts, middle, self._messages)
        self._shown_sample: tuple[str, int] | None = None
        self._drawn = False
        self._last_curve = 0.0

    def _on_stop(self, _button: Any) -> None:
        self.stop_once()

    def stop_once(self) -> None:
        """Count one press of Stop: the first asks to save and end, the second ends at once."""
        self.stop_clicks += 1
        if self.stop_clicks == 1:
            self._head.value = "<b>Stopping: the step is finished, then everything is saved…</b>"
            self._button.description = "Stop at once"
            self._button.tooltip = "what was done since the newest checkpoint is done again next time"
        else:
            self._button.disabled = True

    def show(self, live: Live, steps: Mapping[str, int], samples: Path, *, force: bool = False) -> None:
        """Show where the run is.

        Args:
            live: what it says about itself.
            steps: stage -> steps that are planned; empty while that is not known.
            samples: folder with the pictures it draws.
            force: draw the curve now, however short ago the last time was.
        """
        known = [stage for stage in _STAGES if steps.get(stage)]
        if live.stage:
            steps = {stage: live.steps for stage in (live.stage,)} if live.stage not in known else steps
            before = sum(steps[stage] for stage in known[: known.index(live.stage)]) if live.stage in known else 0
            self._bar.show(before + live.step, sum(steps.values()))
        if not self.stop_clicks:
            self._head.value = f"<b>{html.escape(self._where(live, known, steps))}</b>"
        self._facts.value = _facts(live)
        self._messages.value = "<br>".join(
            f"<span class='fastsd-quiet'>{html.escape(for_notebook(line))}</span>"
            for line in live.messages[-_MESSAGES:]
        )
        if force or time.monotonic() - self._last_curve > 1:
            if any(live.losses.values()):
                self._curve.value = draw_loss_curve(live.losses, steps)
                self._drawn = True
            self._show_sample(samples)
            self._last_curve = time.monotonic()

    @staticmethod
    def _where(live: Live, known: list[str], steps: Mapping[str, int]) -> str:
        if not live.stage:
            return "Loading the model and reading the pictures…" if live.process else "Starting the training…"
        last = not known or live.stage == known[-1]
        if live.step >= live.steps:
            if last:
                return "All steps are done: drawing before and after, writing the file and reading it back…"
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
            self._sample.value = draw_picture(newest, f"pictures drawn at {newest.stem}", _WIDEST_PX)
        except OSError:  # the mount is busy: the next look finds it
            return
        if "<img" not in self._sample.value:  # half written
            return
        self._shown_sample = (newest.name, stamp)
        self._sample.layout.display = ""
        self._sample_title.value = f"<span class='fastsd-quiet'>newest pictures: {html.escape(newest.stem)}</span>"

    def end(self, text: str, *, good: bool, plot: Path | None = None) -> None:
        """Say how it ended; the buttons are out of use from now on.

        Args:
            text: one sentence. What went wrong is not repeated here: the cell's error stands below.
            good: whether it got to its end.
            plot: the picture of the losses in the session, shown where this view has drawn none itself.
        """
        self._head.value = f"<b>{html.escape(for_notebook(text))}</b>"
        self._bar.show(self._bar.total if good else self._bar.done, self._bar.total, kind="good" if good else "bad")
        self._button.disabled = True
        self._button.layout.display = "none"
        if not self._drawn and plot is not None and plot.is_file():
            self._curve.value = draw_picture(plot, "the losses of the whole run", _WIDEST_PX, style="max-width:640px")


def _facts(live: Live) -> str:
    facts = []
    if points := live.losses.get(live.stage):
        recent = [loss for _, loss in points[-20:]]
        facts.append(f"loss {sum(recent) / len(recent):.4f}")
    if live.gpu_bytes:
        facts.append(f"GPU memory {live.gpu_bytes / 2**30:.1f} GiB at most")
    if live.host_bytes:
        facts.append(f"memory {live.host_bytes / 2**30:.1f} GiB at most")
    if live.began and live.process:
        facts.append(f"running for {in_words(max(0.0, time.time() - live.began))}")
    return f"<span class='fastsd-quiet'>{' &nbsp;·&nbsp; '.join(facts)}</span>"
