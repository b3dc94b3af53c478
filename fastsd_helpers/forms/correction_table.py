"""The correction table: each line's picture above a field with its text; what is right is kept at once."""

import html
from typing import Any

from fastsd_helpers.errors import FastSDError
from fastsd_helpers.forms.reading_view import picture_tag
from fastsd_helpers.forms.view import View, load_widgets
from fastsd_helpers.trocr.reading_session import ReadingSession, SavedLine

__all__ = ["CorrectionTable", "correct_lines"]

_ON_A_PAGE = 10
_SHOWN_LETTERS = 60
_WHICH = (
    ("all, as on the page", "all"),
    ("least sure first", "doubt"),
    ("not looked at yet", "open"),
)


def correct_lines(session: ReadingSession) -> "CorrectionTable":
    """Show the lines of a session for correction; a cell's last line displays it."""
    return CorrectionTable(session)


class CorrectionTable(View):
    """Ten lines at a time: picture, field, a button for "this is right as it stands", and one that takes it back.

    A changed field is kept when it is left or Enter is pressed. Lines marked right are learned from too.

    Attributes:
        box: the widgets.
    """

    def __init__(self, session: ReadingSession) -> None:
        self._session, self._first = session, 0
        self._shown: list[SavedLine] = []
        widgets = load_widgets()
        layout = widgets.Layout
        self._which = widgets.Dropdown(options=list(_WHICH), value="all", layout=layout(width="180px"))
        self._back = widgets.Button(description="Back", icon="arrow-left", layout=layout(width="90px"))
        self._next = widgets.Button(description="Next", icon="arrow-right", layout=layout(width="90px"))
        self._rest = widgets.Button(description="All shown are right", icon="check", layout=layout(width="190px"))
        self._rest.add_class("fastsd-all-right")
        self._message = widgets.HTML()
        self._rows = widgets.VBox([])
        self._which.observe(lambda _change: self._go(0), names="value")
        self._back.on_click(lambda _button: self._go(self._first - _ON_A_PAGE))
        self._next.on_click(lambda _button: self._go(self._first + _ON_A_PAGE))
        self._rest.on_click(lambda _button: self._all_right())
        bar = widgets.HBox([self._which, self._back, self._next, self._rest], layout=layout(align_items="center"))
        self.box = widgets.VBox([bar, self._message, self._rows])
        self._go(0)

    def _go(self, first: int) -> None:
        lines = [line for line in self._session.lines() if not line.read.problem]
        if self._which.value == "doubt":
            lines.sort(key=lambda line: line.read.confidence)
        elif self._which.value == "open":
            lines = [line for line in lines if line.right is None]
        self._first = max(0, min(first, len(lines) - 1))
        self._shown = lines[self._first : self._first + _ON_A_PAGE]
        self._back.disabled = self._first == 0
        self._next.disabled = self._first + _ON_A_PAGE >= len(lines)
        self._rest.disabled = not self._shown
        self._rows.children = tuple(self._row(line) for line in self._shown)
        self._tell()

    def _row(self, line: SavedLine) -> Any:
        widgets = load_widgets()
        layout = widgets.Layout
        field = widgets.Text(value=line.text, continuous_update=False, layout=layout(flex="0 0 460px"))
        field.add_class("fastsd-line")
        right = widgets.Button(icon="check", tooltip="It is right as it stands", layout=layout(flex="0 0 40px"))
        right.add_class("fastsd-right")
        undo = widgets.Button(icon="undo", tooltip="Take the correction back", layout=layout(flex="0 0 40px"))
        state = widgets.HTML(self._state(line), layout=layout(flex="1 1 auto", min_width="0"))
        field.observe(lambda change: self._correct(line, change["new"], state), names="value")
        right.on_click(lambda _button: self._correct(line, field.value, state))
        undo.on_click(lambda _button: self._correct(line, None, state, field))
        picture = widgets.HTML(picture_tag(line.picture))
        row = widgets.HBox([field, right, undo, state], layout=layout(align_items="center"))
        return widgets.VBox([picture, row], layout=layout(margin="0 0 8px 0"))

    @staticmethod
    def _state(line: SavedLine) -> str:
        if line.right is None:
            return f"<span style='opacity:.6'>read, {100 * line.read.confidence:.0f} % sure</span>"
        if line.right == line.read.text:
            return "✓ right as read"
        read = line.read.text
        shown = read if len(read) <= _SHOWN_LETTERS else f"{read[:_SHOWN_LETTERS]}…"
        return f"<span style='overflow-wrap:anywhere'>✓ corrected; read as <i>{html.escape(shown)}</i></span>"

    def _correct(self, line: SavedLine, text: str | None, state: Any, field: Any = None) -> None:
        """Keep a correction; without a text undo it, for which the field shows again what was read."""
        try:
            if field is not None:
                field.value = line.read.text  # which keeps it as a correction, if it was another text
            self._session.correct(line.key, text)
        except FastSDError as err:
            self._tell(f"✋ {err.problem} {err.hint}")
            return
        self._refresh(line, state)

    def _refresh(self, line: SavedLine, state: Any) -> None:
        state.value = self._state(next(now for now in self._session.lines() if now.key == line.key))
        self._tell()

    def _all_right(self) -> None:
        texts = [row.children[1].children[0].value for row in self._rows.children]
        try:
            for line, text in zip(self._shown, texts, strict=True):
                if text.strip():
                    self._session.correct(line.key, text)
        except FastSDError as err:
            self._tell(f"✋ {err.problem} {err.hint}")
            return
        self._go(self._first)
        empty = sum(not text.strip() for text in texts)
        if empty:
            self._tell(f"✋ {empty} of them have no text: type it, or leave them out.")

    def _tell(self, problem: str = "") -> None:
        lines = [line for line in self._session.lines() if not line.read.problem]
        done = sum(line.right is not None for line in lines)
        told = f"{done} of {len(lines)} lines looked at" if lines else "Nothing is read yet"
        where = f"; lines {self._first + 1} to {self._first + len(self._shown)} are shown" if self._shown else ""
        self._message.value = f"<b>{told}</b>{where}. {html.escape(problem)}"
