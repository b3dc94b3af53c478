"""The caption editor: which image has which prompt, as a table, and a field to change it.

Nothing typed is lost: a changed text is saved when its field is left, and so before another image is shown, or the
cell is run again.
"""

import html
from pathlib import Path

from fastsd_helpers.captions.prompts import read_caption
from fastsd_helpers.dreambooth.dataset.captioning import prompt_rows, set_caption
from fastsd_helpers.dreambooth.dataset.prepared import PromptRow
from fastsd_helpers.errors import FastSDError
from fastsd_helpers.forms.widgets.view import (
    View,
    draw_error,
    draw_notice,
    draw_picture,
    draw_script,
    draw_table,
    load_widgets,
    make_button,
    make_field,
    make_frame,
    read_as_data,
)
from fastsd_helpers.sessions import Session

__all__ = ["CaptionEditor", "edit_captions"]

_THUMB_PX = 56
_PICTURE_PX = 256
_MOST_TOKENS = 77
# Ctrl+Enter in the field: hand the text over, then show the next image; the notebook must not run the cell instead,
# which JupyterLab leaves alone for what has this attribute.
_KEYS = """
const frame=this.closest('.fastsd');if(!frame||frame.keyed)return;frame.keyed=true;
frame.addEventListener('focusin',event=>{const field=event.target.closest('.fastsd-caption');
if(field)field.setAttribute('data-lm-suppress-shortcuts','true');});
frame.addEventListener('keydown',event=>{
if(event.key!=='Enter'||!(event.ctrlKey||event.metaKey)||!event.target.closest('.fastsd-caption'))return;
event.preventDefault();event.stopPropagation();event.stopImmediatePropagation();
event.target.dispatchEvent(new Event('change',{bubbles:true}));
const next=frame.querySelector('button.fastsd-next-caption,.fastsd-next-caption button');if(next)next.click();
const field=event.target;setTimeout(()=>{field.focus();field.select();},300);},true);
"""


def edit_captions(session: Session) -> "CaptionEditor":
    """Show the prompts of a session's prepared images, and let them be changed; a cell's last line displays it.

    Args:
        session: the session, as `open_session` gives it.

    Returns:
        The view; as a cell's last line it is displayed.
    """
    return CaptionEditor(session)


class CaptionEditor(View):
    """A table of images and prompts, and below it one image with the field for its words."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._rows: dict[str, PromptRow] = {}
        self._thumbs: dict[str, str] = {}
        self._held: dict[str, str] = {}  # image -> typed text that could not be saved
        self._before: dict[str, str] = {}  # captions before the last "same prompt for all"
        self._shown: str | None = None
        self._quiet = False
        self._asked = ""
        self._make_widgets()
        self._load()

    def _make_widgets(self) -> None:
        widgets = load_widgets()
        self._table = widgets.HTML()
        self._choice = widgets.Dropdown(description="photo")
        self._picture = widgets.HTML()
        self._text = widgets.Textarea(
            continuous_update=False,
            description="the exact prompt",
            placeholder="empty: the words of the file name, or the instance prompt of the settings",
            rows=3,
        )
        self._text.add_class("fastsd-caption")
        self._save = make_button("Save", icon="check", kind="primary", name="fastsd-save-caption")
        self._next = make_button("Save, next photo", icon="arrow-right", name="fastsd-next-caption")
        self._all = make_button("Same prompt for all photos", icon="copy", name="fastsd-all-captions")
        self._undo = make_button("Undo", icon="undo")
        self._undo.layout.display = "none"
        self._message = widgets.HTML()
        self._choice.observe(lambda _change: self._turned(), names="value")
        self._text.observe(lambda _change: self._left(), names="value")
        self._save.on_click(lambda _button: self._on_save())
        self._next.on_click(lambda _button: self._on_next())
        self._all.on_click(lambda _button: self._on_all())
        self._undo.on_click(lambda _button: self._on_undo())
        help = "A changed caption is saved as soon as you leave the field. Ctrl+Enter goes to the next photo."
        fields = widgets.VBox(
            [
                make_field(self._choice),
                make_field(self._text, help),
                widgets.HBox([self._save, self._next, self._all, self._undo]),
                self._message,
            ]
        )
        fields.layout.flex = "1 1 300px"
        keys = widgets.HTML(draw_script(_KEYS), layout=widgets.Layout(display="none"))
        editor = widgets.HBox([self._picture, fields], layout=widgets.Layout(align_items="flex-start"))
        self.box = make_frame(keys, self._table, editor, label="The prompts of the photos")

    def _load(self) -> None:
        """Read the prompts anew; a session without images shows the sentence that says so."""
        try:
            self._rows = {row.image: row for row in prompt_rows(self._session)}
        except FastSDError as err:
            self._say_error(err)
            for button in (self._save, self._next, self._all):
                button.disabled = True
            return
        self._table.value = self._draw_table()
        chosen = self._choice.value
        self._quiet = True
        if tuple(self._rows) != tuple(self._choice.options):
            self._choice.options = tuple(self._rows)
        self._choice.value = chosen if chosen in self._rows else next(iter(self._rows), None)
        self._quiet = False
        self._show_chosen()

    def _turned(self) -> None:
        if self._quiet:
            return
        held = self._keep(self._shown)
        self._show_chosen()
        if held:
            self._message.value += held

    def _left(self) -> None:
        """The field was left with another text in it."""
        if self._quiet or self._shown is None:
            return
        said = self._keep(self._shown)
        if said:
            self._message.value = said

    def _keep(self, name: str | None) -> str:
        """Save what is typed for an image if it is new; what cannot be saved is held. Returns HTML, "" for nothing."""
        if name is None or name not in self._rows:
            return ""
        text = self._text.value
        if " ".join(text.split()) == " ".join(self._stored(name).split()):
            self._held.pop(name, None)
            return ""
        try:
            set_caption(self._session, name, text)
        except FastSDError as err:
            self._held[name] = text
            return draw_notice(f"{name} is not saved yet; its text is kept here.", "warn") + draw_error(err)
        self._held.pop(name, None)
        self._rows = {row.image: row for row in prompt_rows(self._session)}
        self._table.value = self._draw_table()
        return draw_notice(self._saved(name), "good")

    def _saved(self, name: str) -> str:
        begun = (self._session.record.get("progress") or {}).get("step")
        warning = " The run that was started used other captions: start again with --restart." if begun else ""
        return f"Saved. Now: {self._rows[name].prompt}{self._count(self._rows[name])}{warning}"

    @staticmethod
    def _count(row: PromptRow) -> str:
        if row.tokens is None:
            return ""
        over = f": everything after token {_MOST_TOKENS} is ignored" if row.truncated else ""
        return f" ({row.tokens} of {_MOST_TOKENS} tokens{over})"

    def _stored(self, name: str) -> str:
        return read_caption(self._session.captions / f"{Path(self._rows[name].image).stem}.txt") or ""

    def _show_chosen(self) -> None:
        row = self._rows.get(self._choice.value)
        if row is None:
            return
        self._shown = row.image
        self._picture.value = draw_picture(
            self._path_of(row), f"{row.image}: {row.prompt}", _PICTURE_PX, style="margin:0 12px 4px 0"
        )
        self._quiet = True
        self._text.value = self._held.get(row.image, self._stored(row.image))
        self._quiet = False
        self._asked = ""
        self._all.description, self._all.button_style = "Same prompt for all photos", ""
        self._say(f"Now: {row.prompt}{self._count(row)}", "warn" if row.truncated else "note")

    def _path_of(self, row: PromptRow) -> Path:
        folder = self._session.held_out_images if row.held_out else self._session.instance_images
        return folder / row.image

    def _on_save(self) -> None:
        name = self._shown
        if name not in self._rows:
            return
        said = self._keep(name)
        self._message.value = said or draw_notice(self._saved(name), "good")

    def _on_next(self) -> None:
        names = list(self._rows)
        if not names:
            return
        place = names.index(self._choice.value)
        if place + 1 < len(names):
            self._choice.value = names[place + 1]
        else:
            self._on_save()
            self._message.value += draw_notice("This is the last photo.")

    def _on_all(self) -> None:
        """Give every photo the words of the field; captions of the user's own are replaced after a second press."""
        text = " ".join(self._text.value.split()) or self._rows[self._choice.value].prompt
        before = {name: self._stored(name) for name in self._rows}
        own = [
            name for name, words in before.items() if words.strip() and words.strip() != text and name != self._shown
        ]
        if own and self._asked != text:
            self._asked = text
            self._all.description = f"Yes, replace {len(own)} other{'s' if len(own) != 1 else ''}"
            self._all.button_style = "danger"
            self._say(
                f"Your own captions are replaced for {', '.join(own[:5])}{' and more' if own[5:] else ''}.", "warn"
            )
            return
        self._before = before
        self._set_all(dict.fromkeys(self._rows, text), f"All {len(self._rows)} photos have the prompt: {text}")

    def _on_undo(self) -> None:
        before, self._before = self._before, {}
        self._set_all(before, "Every photo has its own caption again.")

    def _set_all(self, words: dict[str, str], done: str) -> None:
        try:
            for name, text in words.items():
                set_caption(self._session, name, text)
        except FastSDError as err:
            self._say_error(err)
            return
        self._held = {}
        self._load()
        self._undo.layout.display = "" if self._before else "none"
        self._say(done, "good")

    def _draw_table(self) -> str:
        counted = any(row.tokens is not None for row in self._rows.values())
        heads = ["image", "photo", "exact prompt", *(["tokens"] if counted else []), "notes"]
        rows = []
        for row in self._rows.values():
            if row.image not in self._thumbs:
                self._thumbs[row.image] = read_as_data(self._path_of(row), _THUMB_PX)
            notes = ["held out: never trained on"] * row.held_out
            notes += [f"⚠ over {_MOST_TOKENS} tokens: truncated"] * row.truncated
            rows.append(
                [
                    draw_picture(self._thumbs[row.image], row.image, _THUMB_PX),
                    f"<span style='overflow-wrap:anywhere'>{html.escape(row.image)}</span>",
                    html.escape(row.prompt),
                    *([str(row.tokens if row.tokens is not None else "")] if counted else []),
                    html.escape(", ".join(notes)),
                ]
            )
        return draw_table("prompts", heads, rows)
