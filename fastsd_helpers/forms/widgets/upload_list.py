"""The uploaded photos with a small image each, and a button that removes one after a second press."""

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastsd_helpers.dreambooth.photos.browser_uploads import list_uploads, remove_uploads
from fastsd_helpers.errors import FastSDError
from fastsd_helpers.forms.widgets.view import View, draw_notice, draw_picture, load_widgets, make_button, make_frame
from fastsd_helpers.sessions import Session

__all__ = ["UploadList"]

_SIDE_PX = 112
_TEXTS = (".txt", ".caption", ".csv", ".jsonl")
_MOST = 60  # more small images would make the page slow


class UploadList(View):
    """The list; its images are read when it is opened, because a Drive takes its time.

    Args:
        session: whose uploads they are. changed: called after one or all of them were removed.
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
