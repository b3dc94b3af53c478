"""Words that the model doubted, marked: two degrees, readable in light and dark themes, told in words too."""

import html

from fastsd_helpers.forms.widgets.style import COLOURS
from fastsd_helpers.trocr.model.line import Line

__all__ = ["DOUBT_COLOURS", "draw_doubt", "words_of"]

_UNSURE, _VERY_UNSURE = 0.9, 0.6
# Text and background of a word; the background comes with its text, so that no theme makes it hard to read.
DOUBT_COLOURS = {"low confidence": COLOURS["warn"], "very low confidence": COLOURS["bad"]}


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
