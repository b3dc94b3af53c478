"""Take home what was read and corrected: a choice of formats, and a zip of them to download."""

import base64
import html
from typing import Any

from fastsd_helpers.errors import FastSDError, SettingsError
from fastsd_helpers.forms.widgets.view import View, draw_error, draw_notice, load_widgets, make_button
from fastsd_helpers.trocr.reading.session import SAMPLES_FOLDER, ReadingSession
from fastsd_helpers.trocr.reading.session_files import write_zip
from fastsd_helpers.wording import size_in_words

__all__ = ["DownloadView"]

_FORMATS = {
    "pdf": "searchable PDF", "alto": "ALTO", "page": "PAGE", "hocr": "hOCR", "txt": "text", "csv": "CSV",
    "json": "JSON",
}  # fmt: skip
_CHOSEN = ("pdf", "alto")
_MOST_IN_A_LINK = 25_000_000  # bytes: more of them make a notebook slow, and the file is in the session's folder
_SAID = 5


class DownloadView(View):
    """A row of formats with a button that writes the zip and shows its link."""

    def __init__(self, session: ReadingSession) -> None:
        self._session = session
        widgets = load_widgets()
        self.choices = {
            name: widgets.Checkbox(value=name in _CHOSEN, description=told, indent=False,
                                   layout=widgets.Layout(width="auto", margin="0 12px 0 0"))
            for name, told in _FORMATS.items()
        }  # fmt: skip
        self.button = make_button("Write the files", icon="download", name="fastsd-download")
        self.button.on_click(self._write)
        self._told = widgets.HTML()
        row = widgets.HBox([*self.choices.values(), self.button], layout=widgets.Layout(flex_flow="row wrap"))
        self.box = widgets.VBox([row, self._told])

    def _write(self, _button: Any) -> None:
        self._told.value = draw_notice("The files are written…")
        self.button.disabled = True
        try:
            self._told.value = self._written()
        except FastSDError as err:
            self._told.value = draw_error(err)
        finally:
            self.button.disabled = False

    def _written(self) -> str:
        chosen = [name for name, box in self.choices.items() if box.value]
        if not chosen:
            raise SettingsError("No format is chosen.", "Tick one or several.")
        session = self._session
        own = str(session.uploads if session.list_uploads() else "")
        images = session.record.get("images") or (str(SAMPLES_FOLDER) if session.record.get("demo") else own)
        made = write_zip(session, str(images), chosen)
        size = made.path.stat().st_size
        name = f"{session.name}.zip"
        place = f"{len(made.names)} files, {size_in_words(size)}, in {made.path}"
        if size <= _MOST_IN_A_LINK:
            data = base64.b64encode(made.path.read_bytes()).decode()
            link = f"<a download='{html.escape(name)}' href='data:application/zip;base64,{data}'>Download {name}</a>"
        else:
            link = f"{html.escape(name)} is too large for a link: take it from the session's folder."
        problems = [draw_notice(problem, "warn") for problem in made.problems[:_SAID]]
        return f"<b>{link}</b> ({html.escape(place)})<br>{''.join(problems)}"
