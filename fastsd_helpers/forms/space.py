"""Free space: every session and checkpoint with its size, and a button that deletes after a second question."""

import html
from pathlib import Path
from typing import Any

from fastsd_helpers.drive import free_bytes
from fastsd_helpers.errors import FastSDError
from fastsd_helpers.forms.fields import load_widgets
from fastsd_helpers.sessions import Session, delete_checkpoint, delete_session, list_sessions

__all__ = ["SpaceView", "show_space"]

_TRASH = "On Google Drive, deleted files count until the trash is emptied too: drive.google.com/drive/trash"


def show_space(session: Session) -> "SpaceView":
    """Show what the sessions beside this one take, and let them be deleted; a cell's last line displays it."""
    return SpaceView(session)


class SpaceView:
    """A list of sessions and checkpoints with their sizes, and a button to delete the chosen one."""

    def __init__(self, session: Session) -> None:
        self._session = session
        widgets = load_widgets()
        layout = widgets.Layout
        self._head = widgets.HTML()
        self._choice = widgets.Select(layout=layout(width="520px", height="180px"))
        self._delete = widgets.Button(description="Delete…", icon="trash", layout=layout(width="160px"))
        self._sure = widgets.Button(
            description="Yes, delete it", button_style="danger", layout=layout(width="160px", display="none")
        )
        self._message = widgets.HTML()
        self._choice.observe(lambda _change: self._ask(False), names="value")
        self._delete.on_click(lambda _button: self._ask(True))
        self._sure.on_click(lambda _button: self._go())
        self.box = widgets.VBox([self._head, self._choice, widgets.HBox([self._delete, self._sure]), self._message])
        self._load()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.box)

    def _load(self) -> None:
        root = self._session.folder.parent
        entries: list[tuple[str, Any]] = []
        try:
            for item in list_sessions(root):
                own = "  (this one)" if item.folder == self._session.folder else ""
                entries.append((f"session {item.name}{own}  ·  {_size(item.bytes)}", (item.name, None)))
                for folder in sorted((item.folder / "checkpoints").glob("*")):
                    if folder.is_dir() and not folder.name.startswith("."):
                        label = f"      checkpoint {folder.name}  ·  {_size(_bytes_in(folder))}"
                        entries.append((label, (item.name, folder.name)))
            free = free_bytes(root)
        except FastSDError as err:
            self._say(f"✋ {err.problem} {err.hint}")
            return
        self._choice.options = entries
        self._delete.disabled = not entries
        self._head.value = f"<b>{html.escape(str(root))}</b>: {_size(free)} free. {html.escape(_TRASH)}"
        self._ask(False)

    def _say(self, text: str) -> None:
        self._message.value = html.escape(text)

    def _ask(self, asking: bool) -> None:
        self._sure.layout.display = "" if asking else "none"
        name, checkpoint = self._choice.value or ("", None)
        what = f"the checkpoint {checkpoint} of {name}" if checkpoint else f"the session {name} with all its pictures"
        self._say(f"Delete {what}? This cannot be undone." if asking and name else "")

    def _go(self) -> None:
        name, checkpoint = self._choice.value or ("", None)
        if not name:
            return
        root = self._session.folder.parent
        try:
            if checkpoint:
                freed = delete_checkpoint(Session.open(name, root=root), checkpoint)
            else:
                freed = delete_session(name, root=root)
        except FastSDError as err:
            self._say(f"✋ {err.problem} {err.hint}")
            return
        self._load()
        self._say(f"Deleted: {_size(freed)} freed. {_TRASH}")


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _size(count: float) -> str:
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.2f} GB"
