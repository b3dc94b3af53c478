"""What the web UI notebook shows: the start, the link to copy, the button that stops, free space."""

import html
import time
from collections import deque
from typing import Any

from fastsd_helpers.errors import FastSDError
from fastsd_helpers.files import free_bytes, size_in_words
from fastsd_helpers.forms.delete_view import DeleteView
from fastsd_helpers.forms.notebook_ui import NotebookUI
from fastsd_helpers.forms.view import View, load_widgets
from fastsd_helpers.tunnels import Tunnel
from fastsd_helpers.webui import Kept, delete_kept, list_kept, status, stop

__all__ = ["KeptView", "LinkView", "StartView", "StopView", "show_kept", "show_stop"]

_LINES = 8
_SHOW_EVERY_S = 0.25


class StartView(View):
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


class LinkView(View):
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


def show_stop(webui: NotebookUI) -> "StopView":
    """Offer a button that closes the link and ends the web UI; running all cells ends nothing."""
    return StopView(webui)


class StopView(View):
    """A button that ends the web UI, and one that says how it is."""

    def __init__(self, webui: NotebookUI) -> None:
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


def show_kept(webui: NotebookUI) -> "KeptView":
    """Show what models, pictures and the program take, and let them be deleted; a cell's last line displays it."""
    return KeptView(webui)


class KeptView(DeleteView):
    """Models, pictures and the program."""

    def __init__(self, webui: NotebookUI) -> None:
        self._webui = webui
        super().__init__()

    def _list(self) -> tuple[str, list[tuple[str, Any]]]:
        places = self._webui.places
        kept = list_kept(places, self._webui.ui) if places.store.is_dir() else []
        free, here = size_in_words(free_bytes(places.store)), size_in_words(free_bytes(places.root))
        entries = [(f"{item.kind}  ·  {item.name}  ·  {size_in_words(item.bytes)}", item) for item in kept]
        return html.escape(f"{free} free in {places.store}, {here} on this machine's disk."), entries

    def _name(self, thing: Kept) -> str:
        return f"{thing.name} ({size_in_words(thing.bytes)})"

    def _remove(self, thing: Kept) -> int:
        return delete_kept(thing, self._webui.places)
