"""What a cell shows while it works: what is being done, a bar with the time left, and Stop; and how it waits."""

import html
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastsd_helpers.background import Background
from fastsd_helpers.errors import FastSDError, Interrupted
from fastsd_helpers.forms.widgets.polling import answer_widgets
from fastsd_helpers.forms.widgets.view import Bar, View, draw_notice, load_widgets, make_button, make_frame

__all__ = ["WorkView", "wait_for"]

_LOOK_EVERY_S = 0.5
_MESSAGES = 3


class WorkView(View):
    """A head line, a bar, Stop, room for a drawing or more, and the newest lines of a log.

    Args:
        head: what is done at the start.
        name: what the bar is of, for a screen reader.
        saves: what a first press of Stop does, for its button.
        middle: widgets in place of the drawing.

    Attributes:
        stop_clicks: how often Stop was pressed.
    """

    def __init__(
        self, head: str, name: str, *, saves: str = "Stops soon, and keeps what is done.", middle: Sequence[Any] = ()
    ) -> None:
        widgets = load_widgets()
        self.stop_clicks = 0
        self._said: list[str] = []
        self._head, self._drawing, self._message = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self._bar = Bar(name)
        self._bar.widget.layout = widgets.Layout(flex="1 1 200px", max_width="420px")
        self._button = make_button("Stop", icon="stop", kind="warning", about=saves, name="fastsd-stop")
        self._button.on_click(lambda _button: self.press_stop())
        row = widgets.HBox([self._bar.widget, self._button], layout=widgets.Layout(flex_flow="row wrap"))
        self.box = make_frame(self._head, row, *(middle or [self._drawing]), self._message)
        self.show(head, 0, 1)

    def press_stop(self) -> None:
        """Count a press of Stop; a second one, where the work goes on elsewhere, ends it at once."""
        self.stop_clicks += 1
        if self.stop_clicks == 1:
            self._head.value = "<b role='status'>Stopping: what is done is saved first…</b>"
            self._button.description = "Stop at once"
            self._button.tooltip = "Stops it now; what was done since the last checkpoint is repeated next time."
        else:
            self._button.disabled = True

    def show(self, head: str, done: float, total: float, *, drawing: str = "", messages: Any = ()) -> None:
        """Show how far it is.

        Args:
            head: a sentence.
            done: of the bar.
            total: of the bar.
            drawing: HTML or SVG.
            messages: the newest lines of its log.
        """
        if not self.stop_clicks:
            self._head.value = f"<b role='status'>{html.escape(head)}</b>"
        self._bar.show(done, total)
        if drawing:
            self._drawing.value = drawing
        if messages:
            newest = len(messages) - 1
            self._said = [text for place, text in enumerate(messages) if place == newest or not _is_under_way(text)]
            self._message.value = draw_notice("\n".join(self._said[-_MESSAGES:]))

    def end(self, text: str, *, good: bool, keep: bool = False) -> None:
        """Show how it ended; there is nothing to stop any more.

        Args:
            text: a sentence.
            good: whether it reached its end.
            keep: leave what it said last, but for what was under way.
        """
        self._head.value = draw_notice(text, "good" if good else "warn")
        self._bar.show(self._bar.total if good else self._bar.done, self._bar.total, kind="good" if good else "bad")
        self._close(keep=keep)

    def _close(self, *, keep: bool = False) -> None:
        self._button.layout.display = "none"
        told = [line for line in self._said if not _is_under_way(line)] if keep else []
        self._message.value = draw_notice("\n".join(told[-_MESSAGES:]))

    def end_with(self, err: FastSDError) -> None:
        """Show that it ended early; what stopped it, and what to do next, is said once, below the cell."""
        if isinstance(err, Interrupted):  # as it was asked to: nothing to warn of
            self._head.value = draw_notice("Stopped: run this cell again to resume.")
            self._close()
        else:
            self.end("It ended early; the reason is below.", good=False)


def _is_under_way(text: str) -> bool:
    """Whether a line of a log tells of work that the next line ends, as "Generating images: 74 % ..."."""
    return text.endswith(("...", "…"))


def wait_for(child: Background, view: WorkView, show: Callable[[], None], what: str, **wait: Any) -> Any:
    """Wait for a command in its own process; the view's Stop and the notebook's own let it save first.

    Args:
        child: the command.
        view: where Stop is pressed.
        show: called twice a second, and at the end.
        what: the work, as "The fine-tuning".
        wait: see `Background.wait`.

    Raises:
        Interrupted: it was stopped.
        FastSDError: what `Background.wait` raises.
    """
    asked, looked = 0, 0.0

    def look() -> None:
        nonlocal asked, looked
        answer_widgets()
        if view.stop_clicks > asked:
            asked = view.stop_clicks
            child.stop() if asked == 1 else child.kill()
        if time.monotonic() - looked >= _LOOK_EVERY_S:
            show()
            looked = time.monotonic()

    try:
        try:
            answer = child.wait(what, between=look, **wait)
        except KeyboardInterrupt:  # the notebook's interrupt button
            if not view.stop_clicks:
                view.press_stop()
            answer = child.wait(what, between=look, **wait)
    except KeyboardInterrupt as err:
        view.end("This cell has ended; the work is still being saved, in its own process.", good=False)
        raise Interrupted(
            "The cell was interrupted twice; the work saves and ends by itself.", "Run the cell again to watch it."
        ) from err
    except FastSDError as err:
        show()
        view.end_with(err)
        raise
    show()
    return answer
