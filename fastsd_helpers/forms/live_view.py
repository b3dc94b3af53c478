"""The live view of a training: progress with the time left, loss curve, newest samples, memory, and Stop."""

import html
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsd_helpers.dreambooth.live import Live
from fastsd_helpers.forms.loss_curve import draw_loss_curve
from fastsd_helpers.forms.view import load_widgets
from fastsd_helpers.picture_files import PictureProblem, read_rgb

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


class LiveView:
    """Widgets that show a training; `show` brings them up to date.

    Attributes:
        stop_clicks: how often the Stop button was pressed.
    """

    def __init__(self) -> None:
        widgets = load_widgets()
        layout = widgets.Layout
        self.stop_clicks = 0
        self._head = widgets.HTML("<b>Starting the training…</b>")
        self._bar = widgets.IntProgress(min=0, max=1, layout=layout(width="420px"))
        self._button = widgets.Button(
            description="Stop", icon="stop", button_style="warning", layout=layout(width="150px")
        )
        self._button.add_class("fastsd-stop")
        self._button.on_click(self._on_stop)
        self._facts = widgets.HTML()
        self._curve = widgets.HTML()
        self._sample_title = widgets.HTML()
        self._sample = widgets.Image(format="jpeg", layout=layout(display="none", max_width="512px", width="auto"))
        self._messages = widgets.HTML()
        row = widgets.HBox([self._bar, self._button], layout=layout(align_items="center"))
        pictures = widgets.VBox([self._sample_title, self._sample])
        middle = widgets.HBox([self._curve, pictures], layout=layout(align_items="flex-start", flex_flow="row wrap"))
        self.box = widgets.VBox([self._head, row, self._facts, middle, self._messages])
        self._shown_sample: tuple[str, int] | None = None
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
            self._bar.max, self._bar.value = max(sum(steps.values()), 1), before + live.step
        if not self.stop_clicks:
            self._head.value = f"<b>{html.escape(self._where(live, known, steps))}</b>"
        self._facts.value = _facts(live)
        self._messages.value = "<br>".join(
            f"<span style='opacity:.75'>{html.escape(line)}</span>" for line in live.messages[-_MESSAGES:]
        )
        if force or time.monotonic() - self._last_curve > 1:
            self._curve.value = draw_loss_curve(live.losses, steps)
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
            self._sample.value = _small_jpeg(newest)
        except (OSError, ValueError, PictureProblem):  # half written, or the mount is busy: the next look finds it
            return
        self._shown_sample = (newest.name, stamp)
        self._sample.layout.display = ""
        self._sample_title.value = f"<span style='opacity:.75'>newest pictures: {html.escape(newest.stem)}</span>"

    def end(self, text: str, *, good: bool) -> None:
        """Say how it ended; the buttons are out of use from now on."""
        self._head.value = f"<b>{html.escape(text)}</b>"
        self._bar.bar_style = "success" if good else "warning"
        if good:
            self._bar.value = self._bar.max
        self._button.disabled = True
        self._button.layout.display = "none"


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
    return f"<span style='opacity:.75'>{' &nbsp;·&nbsp; '.join(facts)}</span>"


def _small_jpeg(path: Path) -> bytes:
    """A picture as JPEG of at most 1024 px: a grid of four 512 px samples as PNG would be megabytes at every look."""
    picture = read_rgb(path)
    picture.thumbnail((_WIDEST_PX, _WIDEST_PX))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=88)
    return data.getvalue()
