"""Looking at lines that were read: each image with its text, in which words that the model doubted are marked.

Doubt has two degrees, readable in light and dark themes, and told in words too.
"""

import html
from pathlib import Path

from fastsd_helpers.forms.trocr.reading_download import DownloadView
from fastsd_helpers.forms.widgets.style import COLOURS
from fastsd_helpers.forms.widgets.view import (
    View,
    draw_picture,
    draw_table,
    load_widgets,
    make_button,
    make_frame,
    read_as_data,
)
from fastsd_helpers.trocr.model.line import Line
from fastsd_helpers.trocr.reading.session import ReadingSession, SavedLine

__all__ = ["DOUBT_COLOURS", "ConfidenceView", "draw_doubt", "picture_tag", "show_confidence", "words_of"]

_ON_A_PAGE = 20
_HEIGHT_PX, _WIDTH_PX = 44, 460
_ORDERS = (("page order", "page"), ("lowest confidence first", "doubt"))
_UNSURE, _VERY_UNSURE = 0.9, 0.6
# Text and background of a word; the background comes with its text, so that no theme makes it hard to read.
DOUBT_COLOURS = {"low confidence": COLOURS["warn"], "very low confidence": COLOURS["bad"]}


def show_confidence(session: ReadingSession) -> "ConfidenceView":
    """Show the lines of a session with the model's confidence; a cell's last line displays it.

    Args:
        session: the session, as `open_reading` gives it.

    Returns:
        The view; as a cell's last line it is displayed.
    """
    return ConfidenceView(session)


def picture_tag(path: Path, about: str = "") -> str:
    """A line's image as an <img> of at most 460 x 44 px with its data inside; empty when it cannot be read.

    Args:
        about: what it shows, for those who do not see it.
    """
    data = read_as_data(path, 2 * _WIDTH_PX, 2 * _HEIGHT_PX)  # twice as many, for screens with small pixels
    size = f"max-width:min({_WIDTH_PX}px,100%);max-height:{_HEIGHT_PX}px;width:auto;margin:0"
    return draw_picture(data, about, _WIDTH_PX, style=size) if data else ""


class ConfidenceView(View):
    """A table of lines: image, text with doubtful tokens coloured, confidence, notes; with pages and an order.

    Attributes:
        box: the widgets. download: the row that writes them as files.
    """

    def __init__(self, session: ReadingSession) -> None:
        self._session, self._page = session, 0
        self._lines = session.lines()
        widgets = load_widgets()
        layout = widgets.Layout
        self._order = widgets.Dropdown(
            options=list(_ORDERS),
            value="page",
            description="order",
            style={"description_width": "initial"},
            layout=layout(width="230px"),
        )
        self._back = make_button("Back", icon="arrow-left", about="Previous lines")
        self._next = make_button("Next", icon="arrow-right", about="Next lines")
        self._where, self._table = widgets.HTML(), widgets.HTML()
        self._order.observe(lambda _change: self._turn(-self._page), names="value")
        self._back.on_click(lambda _button: self._turn(-1))
        self._next.on_click(lambda _button: self._turn(1))
        bar = widgets.HBox([self._order, self._back, self._next, self._where], layout=layout(align_items="center"))
        self.download = DownloadView(session)
        self.box = make_frame(bar, self._table, *([self.download.box] if self._lines else []))
        self._draw()

    def _turn(self, pages: int) -> None:
        self._page += pages
        self._draw()

    def _draw(self) -> None:
        lines = list(self._lines)
        if self._order.value == "doubt":
            lines.sort(key=lambda line: line.read.confidence)
        first = self._page * _ON_A_PAGE
        shown = lines[first : first + _ON_A_PAGE]
        self._back.disabled, self._next.disabled = first == 0, first + _ON_A_PAGE >= len(lines)
        self._where.value = (
            f"&nbsp;lines {first + 1} to {first + len(shown)} of {len(lines)}"
            if lines
            else "&nbsp;Nothing has been read yet."
        )
        self._table.value = draw_table(
            "lines that were read", ("line", "confidence", "text", "notes"), map(_row, shown)
        )


def _row(line: SavedLine) -> list[str]:
    read = line.read
    notes = {"looped": "repetition guard: read again", "cut": "truncated"}
    told = [read.problem] if read.problem else [notes.get(note, note) for note in read.notes]
    text = "" if read.problem else draw_doubt(read)
    confidence = "" if read.problem else f"{100 * read.confidence:.0f} %"
    picture = picture_tag(line.picture, f"a line of {read.name}") if line.key else html.escape(read.name)
    wrap = "font-size:15px;white-space:pre-wrap;overflow-wrap:anywhere"
    return [picture, confidence, f"<span style='{wrap}'>{text}</span>", html.escape(", ".join(told))]


def words_of(line: Line) -> list[tuple[str, float]]:
    """The pieces of a line's text, blanks and words in turn, each with the confidence of its least sure token.

    The whole text is one piece where its tokens are parts of letters.
    """
    if "".join(token.text for token in line.tokens).strip() != line.text.strip():
        return [(line.text, line.confidence)]
    pieces: list[tuple[str, float]] = []
    for token in line.tokens:
        for letter in token.text:
            if pieces and pieces[-1][0][-1].isspace() == letter.isspace():
                text, sure = pieces[-1]
                pieces[-1] = (text + letter, 1.0 if letter.isspace() else min(sure, token.confidence))
            else:
                pieces.append((letter, 1.0 if letter.isspace() else token.confidence))
    return pieces


def draw_doubt(line: Line) -> str:
    """The text of a line as HTML, with the words that were doubted marked."""
    return "".join(_mark(text, sure) for text, sure in words_of(line))


def _mark(text: str, sure: float) -> str:
    shown = html.escape(text)
    if sure > _UNSURE or not text.strip():
        return shown
    degree = "low confidence" if sure > _VERY_UNSURE else "very low confidence"
    ink, paper = DOUBT_COLOURS[degree]
    line = "dotted" if degree == "low confidence" else "double"
    style = f"color:{ink};background:{paper};text-decoration:underline {line};border-radius:3px;padding:0 2px"
    return f"<mark title='{degree}: {100 * sure:.0f} %' style='{style}'>{shown}</mark>"
