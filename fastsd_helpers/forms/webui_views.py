"""What the web UI notebook shows: the start, the link to copy, the button that stops, free space."""

import html
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from fastsd_helpers.drive import free_bytes
from fastsd_helpers.errors import FastSDError
from fastsd_helpers.forms.fields import load_widgets
from fastsd_helpers.tunnels import Tunnel
from fastsd_helpers.webui import delete_kept, list_kept, status, stop

if TYPE_CHECKING:
    from fastsd_helpers.forms.webui import NotebookUI

__all__ = ["KeptView", "LinkView", "StartView", "StopView", "show_kept", "show_stop"]

_LINES = 8
_SHOW_EVERY_S = 0.25
_TRASH = "On Google Drive, deleted files count until the trash is emptied too: drive.google.com/drive/trash"


class _View:
    box: Any

    def display(self) -> None:
        """Show it below the cell that is running."""
        from IPython.display import display

        display(self.box)

    def _ipython_display_(self) -> None:
        self.display()


class StartView(_View):
    """The last lines of a web UI's log while it starts, and how it went."""

    def __init__(self, head: str) -> None:
        widgets = load_widgets()
        self._head = widgets.HTML(html.escape(head))
        self._log = widgets.HTML()
        self._last: deque[str] = deque(maxlen=_LINES)
        self._shown_s = 0.0
        self.box = widgets.VBox([self._head, self._log])

    def line(self, line: str) -> None:
        """Take one more line; it is shown with the next look, several times a second."""
        self._last.append(line[:200])
        if time.monotonic() - self._shown_s >= _SHOW_EVERY_S:
            self._draw()

    def end(self, text: str, *, good: bool) -> None:
        """Show the very last lines and one sentence on how it went."""
        self._draw()
        self._head.value = f"<b>{'✓' if good else '✋'} {html.escape(text)}</b>"

    def _draw(self) -> None:
        self._shown_s = time.monotonic()
        text = html.escape("\n".join(self._last))
        self._log.value = f"<pre style='font-size:85%; opacity:.8; white-space:pre-wrap'>{text}</pre>"


class LinkView(_View):
    """One block to copy: link, user, password, expiry. It follows the link when that has to be opened anew."""

    def __init__(self) -> None:
        self._text = load_widgets().HTML()
        self.box = self._text

    def show(self, link: Tunnel) -> None:
        """Show a link; called again, from the watchdog's thread too, when its address has changed."""
        url = html.escape(link.url, quote=True)
        # User and password are meant to be read here; they are in no log.
        self._text.value = (
            f'<b><a href="{url}" target="_blank" rel="noopener">Open {url}</a></b>'
            f"<pre style='user-select:all; padding:.6em; border:1px solid #8886'>{html.escape(link.block())}</pre>"
            f"{html.escape(link.note)}"
        )


def show_stop(webui: "NotebookUI") -> "StopView":
    """Offer a button that closes the link and ends the web UI; running all cells ends nothing."""
    return StopView(webui)


class StopView(_View):
    """A button that ends the web UI, and one that says how it is."""

    def __init__(self, webui: "NotebookUI") -> None:
        self._webui = webui
        widgets = load_widgets()
        layout = widgets.Layout(width="190px")
        self._stop = widgets.Button(description="Stop the web UI", icon="stop", layout=layout)
        self._look = widgets.Button(description="How is it?", icon="refresh", layout=layout)
        self._message = widgets.HTML()
        self._stop.on_click(lambda _button: self.stop())
        self._look.on_click(lambda _button: self.look())
        self.box = widgets.VBox([widgets.HBox([self._stop, self._look]), self._message])
        self.look()

    def look(self) -> None:
        """Say whether it runs, on which link, and why it ended if it did by itself."""
        running, link = self._webui.running, self._webui.link
        problem = running.problem() if running is not None else None
        if running is not None and running.alive():
            shared = f"; its link is {link.url}" if link is not None and not link.closed else "; it is not shared"
            self._say(f"{running.ui.title} runs on port {running.port}{shared}. Its log: {running.log}")
        elif problem is not None:
            self._say(f"✋ {problem.problem} {problem.hint}")
        else:
            places = self._webui.places
            state, runs = status(self._webui.ui.key, folder=str(places.root.parent), store=str(places.store))
            self._say(f"{state.title} runs, started by an earlier notebook." if runs else "No web UI runs.")

    def stop(self) -> None:
        """Close the link and end the web UI with all it started."""
        self._say("Stopping…")
        running = self._webui.running
        try:
            if running is not None:
                running.stop()
                self._webui.running = self._webui.link = None
            else:
                places = self._webui.places
                stop(self._webui.ui.key, folder=str(places.root.parent), store=str(places.store))
        except FastSDError as err:
            self._say(f"✋ {err.problem} {err.hint}")
            return
        self._say("Stopped. To go on, run the cell that starts it.")

    def _say(self, text: str) -> None:
        self._message.value = html.escape(text)


def show_kept(webui: "NotebookUI") -> "KeptView":
    """Show what models, pictures and the program take, and let them be deleted; a cell's last line displays it."""
    return KeptView(webui)


class KeptView(_View):
    """A list of models, pictures and the program with their sizes, and a button to delete the chosen one."""

    def __init__(self, webui: "NotebookUI") -> None:
        self._webui = webui
        widgets = load_widgets()
        layout = widgets.Layout
        self._head = widgets.HTML()
        self._choice = widgets.Select(layout=layout(width="620px", height="180px"))
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

    def _load(self) -> None:
        places = self._webui.places
        try:
            kept = list_kept(places, self._webui.ui) if places.store.is_dir() else []
            free, here = free_bytes(places.store), free_bytes(places.root)
        except FastSDError as err:
            self._say(f"✋ {err.problem} {err.hint}")
            return
        self._choice.options = [(f"{item.kind}  ·  {item.name}  ·  {_size(item.bytes)}", item) for item in kept]
        self._delete.disabled = not kept
        where = f"{_size(free)} free in {places.store}, {_size(here)} on this machine's disk."
        self._head.value = f"{html.escape(where)} {html.escape(_TRASH)}"
        self._ask(False)

    def _say(self, text: str) -> None:
        self._message.value = html.escape(text)

    def _ask(self, asking: bool) -> None:
        item = self._choice.value
        asking = asking and item is not None
        self._sure.layout.display = "" if asking else "none"
        self._say(f"Delete {item.name} ({_size(item.bytes)})? This cannot be undone." if asking else "")

    def _go(self) -> None:
        item = self._choice.value
        if item is None:
            return
        try:
            freed = delete_kept(item, self._webui.places)
        except FastSDError as err:
            self._say(f"✋ {err.problem} {err.hint}")
            return
        self._load()
        self._say(f"Deleted: {_size(freed)} freed. {_TRASH}")


def _size(count: float) -> str:
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.2f} GB"
