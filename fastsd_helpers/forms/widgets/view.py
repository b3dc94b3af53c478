"""What every view of a notebook is made of: frame, labelled fields, buttons, notices, a bar, images with words."""

import base64
import html
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import DependencyMissing, FastSDError, needs_package
from fastsd_helpers.forms.widgets.style import read_script, read_style
from fastsd_helpers.wording import for_notebook

__all__ = [
    "Bar",
    "View",
    "draw_error",
    "draw_notice",
    "draw_picture",
    "draw_script",
    "draw_table",
    "in_words",
    "load_widgets",
    "make_button",
    "make_field",
    "make_frame",
    "read_as_data",
    "show_widget",
]


# A cell of a table that is one figure with its unit, as "65 %" or "3 → 1": over two lines it cannot be read.
_FIGURE = re.compile(r"[~<]?[\d.,]+(?: \S{1,3}(?: [\d.,]+)?)?")

# What is shown, in place of a form, by a page whose front end has no widgets.
_NO_WIDGETS = (
    "This page cannot show the form. Open the notebook in Colab, Kaggle or JupyterLab; or run "
    "`pip install ipywidgets jupyterlab_widgets`, restart Jupyter, reload the page and run this cell again. "
    "Nothing is lost: what was entered before is kept in the session."
)


def load_widgets() -> Any:
    """Import ipywidgets; raises DependencyMissing where it is not installed."""
    with needs_package("A form", "Run: pip install ipywidgets and restart the notebook, or use the command `fastsd`."):
        import ipywidgets
    if not hasattr(ipywidgets, "Combobox"):  # came with 7.5
        raise DependencyMissing(
            f"A form needs ipywidgets 7.5 or newer, and {ipywidgets.__version__} is installed.",
            "Run: pip install --upgrade ipywidgets, then restart the notebook and reload its page.",
        )
    return ipywidgets


def show_widget(box: Any) -> None:
    """Show a widget below the cell that is running; a page that cannot show widgets says what to do instead."""
    from IPython.display import display

    view = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
    display({"text/plain": _NO_WIDGETS, "application/vnd.jupyter.widget-view+json": view}, raw=True)


def make_frame(*children: Any, label: str = "") -> Any:
    """The outermost box of a form or a view: it brings the stylesheet, and what is inside wraps in a narrow cell.

    Args:
        children: what is in it.
        label: what it is for, read out when somebody comes to it by keyboard.
    """
    widgets = load_widgets()
    name = f'<span class="fastsd-name">{html.escape(label)}</span>' if label else ""
    page = f"<style>{read_style()}</style>{name}{draw_script(read_script('frame.js'))}"
    style = widgets.HTML(page, layout=widgets.Layout(display="none"))
    frame = widgets.VBox([style, *children])
    frame.add_class("fastsd")
    return frame


def draw_script(code: str) -> str:
    """HTML that runs a few lines of JavaScript once it is in the page; `this` is an element inside the frame.

    A handler, because a script that is put into a page this way is not run. Where a page runs neither, everything can
    be used all the same.
    """
    return f'<img src="data:," alt="" style="display:none" onerror="{html.escape(" ".join(code.split()), quote=True)}">'


def make_field(widget: Any, help: str = "", *, below: Any = None) -> Any:
    """A row of a form: the widget with its label, the help beside it, or beneath it where there is no room.

    Args:
        widget: made with `description`, which is the label that a screen reader reads out too.
        help: text, not HTML.
        below: a widget over the whole width beneath both, for what is wrong with the value.
    """
    widgets = load_widgets()
    column = widgets.VBox([widget])
    column.add_class("fastsd-input")
    parts = [column]
    if help:
        about = widgets.HTML(html.escape(help))
        about.add_class("fastsd-help")
        parts.append(about)
    if below is not None:
        below.add_class("fastsd-below")
        parts.append(below)
    row = widgets.HBox(parts)
    row.add_class("fastsd-field")
    return row


def make_button(text: str, *, icon: str = "", kind: str = "", about: str = "", name: str = "") -> Any:
    """A button as wide as its words.

    Args:
        text: what it says.
        icon: a Font Awesome name.
        kind: primary, warning, danger, success or "" for a plain one.
        about: a sentence shown when the mouse rests on it.
        name: a class, to be found by.
    """
    widgets = load_widgets()
    made = widgets.Button(description=text, icon=icon, button_style=kind, tooltip=about or text)
    if name:
        made.add_class(name)
    return made


def draw_notice(text: str, kind: str = "note") -> str:
    """A sentence as HTML; "" for no text.

    Args:
        text: not HTML.
        kind: bad, warn, good, or note, which has no colour of its own.
    """
    if not text:
        return ""
    role = "alert" if kind == "bad" else "status"
    sign = {"bad": "✗ ", "warn": "⚠ ", "good": "✓ "}.get(kind, "")
    lines = "<br>".join(html.escape(line) for line in for_notebook(text).splitlines())
    if kind == "note":
        return f'<div role="{role}">{lines}</div>'
    return f'<div class="fastsd-notice {kind}" role="{role}">{sign}{lines}</div>'


def draw_error(err: FastSDError) -> str:
    """An error as HTML: what happened, and below it what to do next."""
    return draw_notice(f"{err.problem}\n{err.hint}".strip(), "bad")


def draw_picture(source: Path | str, alt: str, size_px: int, *, style: str = "") -> str:
    """An image as an <img> of at most that many pixels with its data inside; its words alone when it is unreadable.

    Args:
        source: a file, or a data: address.
        alt: what it shows, for those who do not see it.
    """
    data = source if isinstance(source, str) else read_as_data(source, size_px)
    if not data:
        return f'<span class="fastsd-quiet">{html.escape(alt)}: no image</span>'
    return f'<img src="{data}" alt="{html.escape(alt, quote=True)}" style="display:block;{style}">'


def read_as_data(path: Path, width_px: int, height_px: int | None = None) -> str:
    """An image file as a data: address of at most that many pixels; an empty one when it cannot be read."""
    from fastsd_helpers.images.files import PictureProblem, read_rgb

    try:
        picture = read_rgb(path)
    except (OSError, ValueError, PictureProblem):
        return ""
    picture.thumbnail((width_px, height_px or width_px))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def draw_table(name: str, heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table as HTML, in a box of its own that scrolls.

    Args:
        name: what it holds, for those who hear it.
        heads: text.
        rows: their cells, as HTML.
    """
    style = "text-align:left;padding:3px 10px"
    lines = ["".join(f"<th scope='col' style='{style}'>{html.escape(text)}</th>" for text in heads)]
    for row in rows:
        kept = ((cell, ";white-space:nowrap" if _FIGURE.fullmatch(html.unescape(cell)) else "") for cell in row)
        lines.append("".join(f"<td style='{style}{more}'>{cell}</td>" for cell, more in kept))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f"<div tabindex='0' role='group' aria-label='{html.escape(name, quote=True)}' style='max-height:560px;"
        f"overflow:auto'><table style='border-collapse:collapse'>{body}</table></div>"
    )


def in_words(seconds: float) -> str:
    """A length of time as people say it: "40 s", "12 min", "1 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Bar:
    """A progress bar that a screen reader can read out.

    Attributes:
        widget: to be placed in a view.
    """

    def __init__(self, label: str) -> None:
        self._label, self._kind = label, ""
        self.done: float = 0
        self.total: float = 1
        self.widget = load_widgets().HTML()
        self.show(0, 1)

    def show(self, done: float, total: float, *, kind: str = "") -> None:
        """Show how far it is.

        Args:
            done: in the same unit.
            total: in the same unit.
            kind: good or bad once it has ended.
        """
        self.done, self.total, self._kind = done, max(total, 1), kind or self._kind
        share = 100 * min(max(self.done / self.total, 0.0), 1.0)
        self.widget.value = (
            f'<div class="fastsd-bar {self._kind}" role="progressbar" aria-label="{html.escape(self._label)}" '
            f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{share:.0f}"><div style="width:{share:.1f}%"></div>'
            "</div>"
        )


class View:
    """A box of widgets; `_say` and `_say_error` need a `_message` among them.

    Attributes:
        box: the outermost widget, made with `make_frame`.
    """

    box: Any
    _message: Any

    def display(self) -> None:
        """Show it below the cell that is running."""
        show_widget(self.box)

    def _ipython_display_(self) -> None:
        self.display()

    def _say(self, text: str, kind: str = "note") -> None:
        self._message.value = draw_notice(text, kind)

    def _say_error(self, err: FastSDError) -> None:
        self._message.value = draw_error(err)
