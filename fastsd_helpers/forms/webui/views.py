"""What the web UI notebook shows: the start, the link to copy, the button that stops, free space."""

import html
import threading
import time
from collections import deque

from fastsd_helpers.drive import deletion_note
from fastsd_helpers.errors import FastSDError
from fastsd_helpers.files import free_bytes
from fastsd_helpers.forms.webui.shared_state import NotebookUI
from fastsd_helpers.forms.widgets.delete_view import DeleteView
from fastsd_helpers.forms.widgets.view import View, load_widgets, make_button, make_frame
from fastsd_helpers.tunnels import Tunnel
from fastsd_helpers.webui import Kept, delete_kept, find_link, list_kept, stop
from fastsd_helpers.webui.running.background import BackgroundLink
from fastsd_helpers.wording import size_in_words

__all__ = ["LinkView", "StartView", "StopView", "show_kept", "show_stop"]

_LINES = 8
_SHOW_EVERY_S = 0.25
_LOOK_EVERY_S = 5.0


class StartView(View):
    """The last lines of a web UI's log while it starts, and how it went."""

    def __init__(self, head: str) -> None:
        widgets = load_widgets()
        self._message = widgets.HTML()
        self._log = widgets.HTML()
        self._last: deque[str] = deque(maxlen=_LINES)
        self._shown_s = 0.0
        self.box = make_frame(self._message, self._log)
        self._say(head)

    def line(self, line: str) -> None:
        """Take one more line; it is shown with the next look, several times a second."""
        self._last.append(line[:200])
        if time.monotonic() - self._shown_s >= _SHOW_EVERY_S:
            self._draw()

    def end(self, text: str, *, good: bool) -> None:
        """Show the very last lines and one sentence on how it went."""
        self._draw()
        self._say(text, "good" if good else "bad")

    def _draw(self) -> None:
        self._shown_s = time.monotonic()
        text = html.escape("\n".join(self._last))
        self._log.value = f"<pre style='font-size:85%; opacity:.8; white-space:pre-wrap'>{text}</pre>"


class LinkView(View):
    """One block to copy: link, user, password, expiry. It follows the link when that has to be reopened."""

    def __init__(self) -> None:
        self._message = load_widgets().HTML()
        self.box = make_frame(self._message)

    def show(self, link: "Tunnel | BackgroundLink") -> None:
        """Show a link; called again, from another thread too, when its address has changed.

        Args:
            link: with its present address.
        """
        url = html.escape(link.url, quote=True)
        # User and password are meant to be read here; they are in no log.
        self._message.value = (
            f'<b><a href="{url}" target="_blank" rel="noopener">Open {url}</a></b>'
            f"<pre style='user-select:all; padding:.6em; border:1px solid #8886; white-space:pre-wrap'>"
            f"{html.escape(link.block())}</pre>{html.escape(link.note)}"
        )

    def follow(self, webui: NotebookUI, *, every_s: float = _LOOK_EVERY_S) -> None:
        """Go on looking at the link that another process holds: its new address is shown, and its end is said.

        Args:
            webui: the notebook's web UI, as `open_store` gives it.
            every_s: seconds between two looks.
        """
        shown = webui.link
        if isinstance(shown, BackgroundLink):
            threading.Thread(target=self._keep_looking, args=(webui, shown, every_s), daemon=True).start()

    def _keep_looking(self, webui: NotebookUI, shown: BackgroundLink, every_s: float) -> None:
        running = webui.running
        while running is not None and webui.link is shown:
            time.sleep(every_s)
            now = find_link(running)
            if now is None and webui.link is shown:
                self._say("This link is closed.", "warn")
                return
            if now is not None and (now.url, now.text) != (shown.url, shown.text) and webui.link is shown:
                webui.link = shown = now
                self.show(now)


def show_stop(webui: NotebookUI) -> "StopView":
    """Offer a button that closes the link and ends the web UI; running all cells ends nothing.

    Args:
        webui: the notebook's web UI, as `open_store` gives it.

    Returns:
        The view with its button; as a cell's last line it is displayed.
    """
    return StopView(webui)


class StopView(View):
    """A button that ends the web UI, and one that says how it is."""

    def __init__(self, webui: NotebookUI) -> None:
        self._webui = webui
        self._stop = make_button("Stop the web UI", icon="stop")
        self._look = make_button("Status", icon="refresh")
        self._message = load_widgets().HTML()
        self._stop.on_click(lambda _button: self.stop())
        self._look.on_click(lambda _button: self.look())
        self.box = make_frame(load_widgets().HBox([self._stop, self._look]), self._message)
        self.look()

    def look(self) -> None:
        """Say whether it runs, on which link, and why it ended if it did by itself."""
        running = self._webui.look()
        problem = self._webui.running.problem() if self._webui.running is not None else None
        if running is not None:
            link = self._webui.link
            shared = f"its link is {link.url}" if link is not None else "it is not shared"
            self._say(f"{running.ui.title} runs on port {running.port}; {shared}. Its log: {running.log}")
        elif problem is not None:
            self._say_error(problem)
        else:
            self._say("No web UI is running.")

    def stop(self) -> None:
        """Close the link and end the web UI with all it started."""
        running = self._webui.look()
        try:
            if running is not None:
                self._say("Stopping…")
                running.stop()
                stopped = True
            else:
                # One whose login is not known here can be ended all the same.
                places = self._webui.places
                stopped = stop(self._webui.ui.key, folder=str(places.root.parent), store=str(places.store))
        except FastSDError as err:
            self._say_error(err)
            return
        self._webui.forget()
        self._say(
            "Stopped. Run cell 6b to start it again." if stopped else "No web UI was running, so nothing was stopped."
        )


def show_kept(webui: NotebookUI) -> DeleteView[Kept]:
    """Show what models, images and the program take, and let them be deleted; a cell's last line displays it.

    Args:
        webui: the notebook's web UI, as `open_store` gives it.

    Returns:
        The view; as a cell's last line it is displayed.
    """

    def listed() -> tuple[str, list[tuple[str, Kept]]]:
        places = webui.places
        kept = list_kept(places, webui.ui) if places.store.is_dir() else []
        free, here = size_in_words(free_bytes(places.store)), size_in_words(free_bytes(places.root))
        entries = [(f"{item.kind}  ·  {item.name}  ·  {size_in_words(item.bytes)}", item) for item in kept]
        return html.escape(f"{free} free in {places.store}, {here} on this machine's disk."), entries

    return DeleteView(
        listed,
        lambda thing: f"{thing.name} ({size_in_words(thing.bytes)})",
        lambda thing: delete_kept(thing, webui.places),
        lambda thing: deletion_note(thing.path if thing else webui.places.store),
    )
