"""The caption editor: which picture has which prompt, as a table, and a field to change it."""

import base64
import html
import io
from pathlib import Path

from fastsd_helpers.captions import read_caption
from fastsd_helpers.dreambooth.captioning import prompt_rows, set_caption
from fastsd_helpers.dreambooth.dataset import PromptRow
from fastsd_helpers.errors import FastSDError
from fastsd_helpers.forms.view import View, load_widgets
from fastsd_helpers.picture_files import PictureProblem, read_rgb
from fastsd_helpers.sessions import Session

__all__ = ["CaptionEditor", "edit_captions"]

_THUMB_PX = 56
_PICTURE_PX = 256


def edit_captions(session: Session) -> "CaptionEditor":
    """Show the prompts of a session's prepared pictures, and let them be changed; a cell's last line displays it."""
    return CaptionEditor(session)


class CaptionEditor(View):
    """A table of pictures and prompts, and below it one picture with the field for its words."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._rows: dict[str, PromptRow] = {}
        self._thumbs: dict[str, str] = {}
        widgets = load_widgets()
        layout = widgets.Layout
        self._table = widgets.HTML()
        self._choice = widgets.Select(layout=layout(width="250px", height="256px"))
        self._picture = widgets.HTML()
        self._text = widgets.Textarea(
            continuous_update=False,
            placeholder="empty: the words of the file name, or the instance prompt of the settings",
            layout=layout(width="420px", height="110px"),
        )
        self._text.add_class("fastsd-caption")
        self._save = widgets.Button(
            description="Save", icon="check", button_style="primary", layout=layout(width="120px")
        )
        self._save.add_class("fastsd-save-caption")
        self._message = widgets.HTML()
        self._choice.observe(lambda _change: self._show_chosen(), names="value")
        self._save.on_click(lambda _button: self._on_save())
        fields = widgets.VBox([widgets.HTML("<b>the exact prompt</b>"), self._text, self._save, self._message])
        editor = widgets.HBox([self._choice, self._picture, fields], layout=layout(align_items="flex-start"))
        self.box = widgets.VBox([self._table, editor])
        self._load()

    def _load(self) -> None:
        chosen = self._choice.value
        try:
            self._rows = {row.image: row for row in prompt_rows(self._session)}
        except FastSDError as err:
            self._say(f"✋ {err.problem} {err.hint}")
            self._save.disabled = True
            return
        self._table.value = self._draw_table()
        if tuple(self._rows) != tuple(self._choice.options):
            self._choice.options = tuple(self._rows)
        self._choice.value = chosen if chosen in self._rows else next(iter(self._rows), None)
        self._show_chosen()

    def _show_chosen(self) -> None:
        row = self._rows.get(self._choice.value)
        if row is None:
            return
        path = self._path_of(row)
        self._picture.value = f'<img src="{_as_data(path, _PICTURE_PX)}" style="display:block;margin:0 8px">'
        self._text.value = read_caption(self._caption_path(row)) or ""
        self._say(f"Now: {row.prompt}")

    def _path_of(self, row: PromptRow) -> Path:
        folder = self._session.held_out_images if row.held_out else self._session.instance_images
        return folder / row.image

    def _caption_path(self, row: PromptRow) -> Path:
        return self._session.captions / f"{Path(row.image).stem}.txt"

    def _on_save(self) -> None:
        name = self._choice.value
        if name not in self._rows:
            return
        try:
            set_caption(self._session, name, self._text.value)
        except FastSDError as err:
            self._say(f"✋ {err.problem} {err.hint}")
            return
        self._load()
        begun = (self._session.record.get("progress") or {}).get("step")
        warning = " The run that has begun knew other words: start it again with restart=True." if begun else ""
        self._say(f"Saved. Now: {self._rows[name].prompt}{warning}")

    def _draw_table(self) -> str:
        counted = any(row.tokens is not None for row in self._rows.values())
        heads = ["", "picture", "exact prompt", *(["tokens"] if counted else []), ""]
        lines = ["".join(f"<th style='text-align:left;padding:2px 10px'>{head}</th>" for head in heads)]
        for row in self._rows.values():
            if row.image not in self._thumbs:
                self._thumbs[row.image] = _as_data(self._path_of(row), _THUMB_PX)
            notes = ["never trained on: held out"] * row.held_out + ["⚠ its end is cut off"] * row.truncated
            cells = [
                f"<img src='{self._thumbs[row.image]}' style='display:block'>",
                html.escape(row.image),
                html.escape(row.prompt),
                *([str(row.tokens if row.tokens is not None else "")] if counted else []),
                html.escape(", ".join(notes)),
            ]
            lines.append("".join(f"<td style='text-align:left;padding:2px 10px'>{cell}</td>" for cell in cells))
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        return (
            f"<div style='max-height:420px;overflow:auto'><table style='border-collapse:collapse'>{body}</table></div>"
        )


def _as_data(path: Path, size_px: int) -> str:
    """A picture as a data: address of at most that many pixels; an empty one when it cannot be read."""
    try:
        picture = read_rgb(path)
    except (OSError, ValueError, PictureProblem):
        return ""
    picture.thumbnail((size_px, size_px))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
