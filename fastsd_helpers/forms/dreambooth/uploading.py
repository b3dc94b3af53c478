"""The form of the photos: an upload button and the list of uploads above the settings of `prepare`."""

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig
from fastsd_helpers.dreambooth.photos.browser_uploads import (
    count_uploads,
    list_uploads,
    remove_uploads,
    save_uploads,
    uploads_folder,
)
from fastsd_helpers.errors import FastSDError
from fastsd_helpers.forms.widgets.file_bridge import FileBridge
from fastsd_helpers.forms.widgets.form import Form
from fastsd_helpers.forms.widgets.view import View, draw_notice, draw_picture, load_widgets, make_button, make_frame
from fastsd_helpers.sessions import Session

__all__ = ["PhotosForm", "show_photos_form", "uploaded_files"]

# No "image/*" alone: browsers do not count HEIC among it.
_KINDS = "image/*,.heic,.heif,.hif,.avif,.zip,.txt,.caption,.csv,.jsonl"
_LINES = 8
_MOST_TWINS = 3
_HERE = " here already"
_SIDE_PX = 112
_TEXTS = (".txt", ".caption", ".csv", ".jsonl")
_MOST = 60  # more small images would make the page slow


def uploaded_files(value: Any) -> list[tuple[str, bytes]]:
    """(name, content) of what FileUpload holds: a dict by name in ipywidgets 7, a tuple of dicts in 8."""
    if isinstance(value, dict):
        return [(name, bytes(entry["content"])) for name, entry in value.items()]
    return [(entry["name"], bytes(entry["content"])) for entry in value]


def show_photos_form(session: Session) -> "PhotosForm":
    """Make the form for the photos of a session; the last line of a cell displays it.

    Args:
        session: the session, as `open_session` gives it.

    Returns:
        The form; as a cell's last line it is displayed, and its `config()` gives the settings.
    """
    return PhotosForm(PrepareConfig, session=session)


class PhotosForm(Form[PrepareConfig]):
    """Settings of `prepare` with an upload button; what is uploaded is kept in the session and becomes `images`."""

    _session: Session

    def _draw(self) -> Any:
        widgets = load_widgets()
        layout = widgets.Layout
        self._report: list[str] = []
        self._twins = 0
        self._bridge = FileBridge(_KINDS, lambda name, data: self._keep([(name, data)]))
        self._small = widgets.FileUpload(accept=_KINDS, multiple=True, layout=layout(width="150px"))
        self._small.observe(lambda _change: self._keep(uploaded_files(self._small.value)), names="value")
        self._list = UploadList(self._session, self._removed)
        self._uploaded = widgets.HTML()
        about = widgets.HTML(
            "<div>Photos (JPEG, PNG, WebP, HEIC), a zip of them, and .txt captions of the same names; or name a folder "
            "or a zip below.</div>"
        )
        other = widgets.Accordion([self._small], selected_index=None)
        other.set_title(0, "If the button above does nothing here: another one, for up to 8 MB at a time")
        form = super()._draw()
        self._count()
        return make_frame(about, self._bridge.box, self._uploaded, self._list.box, form, other)

    def _keep(self, files: list[tuple[str, bytes]]) -> None:
        if not files:
            return
        try:
            report = save_uploads(self._session, files)
            if list_uploads(self._session):
                self.update(images=str(uploads_folder(self._session)))
        except FastSDError as err:
            self._report.append(f"✗ {err.problem} {err.hint}")
        else:
            # Files come one by one: forty that were here already are one sentence all the same.
            self._twins += report.twins
            several = self._twins > _MOST_TWINS
            self._report = [line for line in self._report if not (several and _HERE in line)]
            self._report += [line for line in report.lines()[1:] if not (several and _HERE in line)]
        again = [f"{self._twins} files were here already, and are kept only once."] if self._twins > _MOST_TWINS else []
        self._count(*again, *self._report[-_LINES:])

    def _removed(self) -> None:
        if not list_uploads(self._session) and self.values()["images"] == str(uploads_folder(self._session)):
            self.update(images="")
        self._report, self._twins = [], 0
        self._count()

    def _count(self, *lines: str) -> None:
        files = list_uploads(self._session)
        try:
            photos, captions, notes = count_uploads(self._session)
        except FastSDError as err:
            photos, captions, notes = len(files), 0, [f"✗ {err.problem} {err.hint}"]
        have = (
            f"{photos} uploaded photo{'s' if photos != 1 else ''} in this session" if files else "Nothing uploaded yet"
        )
        have += f", {captions} with a caption" if captions else ""
        lines = (*lines, *(note for note in notes if note not in lines))
        shown = [f"<b>{html.escape(have)}.</b>", *(html.escape(line) for line in lines)]
        self._uploaded.value = "<br>".join(shown)
        self._list.refresh()


class UploadList(View):
    """The uploaded photos with a small image each, and a button that removes one after a second press.

    Its images are read when it is opened, because a Drive takes its time.

    Args:
        session: whose uploads they are.
        changed: called after one or all of them were removed.
    """

    def __init__(self, session: Session, changed: Callable[[], None]) -> None:
        self._session, self._changed = session, changed
        self._asked: Path | None = None
        self._seen: dict[Path, str] = {}
        widgets = load_widgets()
        self._message = widgets.HTML()
        self._tiles = widgets.Box(layout=widgets.Layout(flex_flow="row wrap"))
        self._all = make_button("Remove all uploads…", icon="trash", name="fastsd-remove-all")
        self._all.on_click(lambda _button: self._ask_all())
        self._sure = make_button("Yes, remove all of them", kind="danger", name="fastsd-remove-sure")
        self._sure.on_click(lambda _button: self._remove(None))
        inside = widgets.VBox([self._message, self._tiles, widgets.HBox([self._all, self._sure])])
        self.accordion = widgets.Accordion([inside], selected_index=None)
        self.accordion.set_title(0, "Show the uploads, and remove some")
        self.accordion.observe(lambda _change: self.refresh(), names="selected_index")
        self.box = make_frame(self.accordion)
        self.refresh()

    def refresh(self) -> None:
        """Show what is there now."""
        try:
            files = list_uploads(self._session)
        except FastSDError as err:
            self._say_error(err)
            return
        self.box.layout.display = "" if files else "none"
        self._sure.layout.display = "none"
        self._asked = None
        if self.accordion.selected_index is None:
            return
        self._tiles.children = [self._draw_tile(path, files) for path in files[:_MOST]]
        self._say(f"{len(files) - _MOST} more are not shown here." if len(files) > _MOST else "")

    def _draw_tile(self, path: Path, files: list[Path]) -> Any:
        widgets = load_widgets()
        if path not in self._seen and path.suffix.lower() not in _TEXTS:
            self._seen[path] = draw_picture(path, f"Uploaded photo {path.name}", _SIDE_PX)
        picture = widgets.HTML(self._seen.get(path, ""))
        name = widgets.HTML(f"<div style='overflow-wrap:anywhere'>{html.escape(path.name)}</div>")
        remove = make_button("Remove", about=f"Remove {path.name}", name="fastsd-remove-one")
        remove.on_click(lambda button: self._press(path, button))
        layout = widgets.Layout(width=f"{_SIDE_PX + 16}px", margin="4px")
        return widgets.VBox([picture, name, remove], layout=layout)

    def _press(self, path: Path, button: Any) -> None:
        if self._asked == path:
            self._remove(path)
            return
        self._asked = path
        button.description = "Yes, remove it"
        self._say(f"Remove {path.name}? Images that were prepared from it stay until the photos are read again.")

    def _ask_all(self) -> None:
        self._sure.layout.display = ""
        self._say("Remove every uploaded photo and caption? Images that were prepared from them stay.", "warn")

    def _remove(self, path: Path | None) -> None:
        try:
            gone = remove_uploads(self._session, None if path is None else [path.name])
        except FastSDError as err:
            self._say_error(err)
            return
        self.refresh()
        self._changed()
        self._message.value = draw_notice(f"{gone} file{'s' if gone != 1 else ''} removed.")
