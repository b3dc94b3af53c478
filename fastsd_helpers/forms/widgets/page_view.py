"""A button that opens a small page of ours, and one that closes it; so "Run all" does not wait for a model."""

import contextlib
import html
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from fastsd_helpers.errors import FastSDError
from fastsd_helpers.forms.widgets.view import View, load_widgets, make_button, make_frame
from fastsd_helpers.runtime import logger, redact
from fastsd_helpers.tunnels import LocalPage

__all__ = ["PageView"]

Page = TypeVar("Page", bound=LocalPage)

_TELL_EVERY_S = 1.0
_LOADING = "Loading the model…"


class PageView(View, Generic[Page]):
    """The buttons, and where the page is once it is open.

    Args:
        name: of the page.
        start: loads the model and starts the page.
        where: its address, and what to say of its login.

    Attributes:
        page: the open page, or None.
    """

    def __init__(self, name: str, start: Callable[[], Page], where: Callable[[Page], tuple[str, str]]) -> None:
        self.page: Page | None = None
        self._start, self._where = start, where
        self._open = make_button(f"Open the {name}", icon="play", name="fastsd-open-page")
        self._close = make_button("Close it", icon="stop")
        self._close.disabled = True
        self._message = load_widgets().HTML()
        self._open.on_click(lambda _button: self.open())
        self._close.on_click(lambda _button: self.close())
        self.box = make_frame(load_widgets().HBox([self._open, self._close]), self._message)

    def open(self) -> None:
        """Load the model and open the page, saying all the while how it goes; what goes wrong is a sentence."""
        if self.page is not None:
            return
        self._open.disabled = True
        try:
            with self._say_how_it_goes():
                self.page = self._start()
            url, login = self._where(self.page)
        except FastSDError as err:
            self.close()
            self._say_error(err)
            return
        link = f'<a href="{html.escape(url, quote=True)}" target="_blank" rel="noopener">{html.escape(url)}</a>'
        # The one place where a password is shown, which is meant to be read here; the log never has it.
        self._message.value = f"<b>Open: {link}</b><pre class='fastsd-login'>{html.escape(login)}</pre>"
        self._close.disabled = False

    def close(self) -> None:
        """Close the page and its link."""
        page, self.page = self.page, None
        if page is not None:
            page.close()
            self._say("Closed.")
        self._open.disabled, self._close.disabled = False, True

    @contextlib.contextmanager
    def _say_how_it_goes(self) -> Iterator[None]:
        """Show the seconds that have passed, and what the library last said, as long as the block takes."""
        begun, ended = time.monotonic(), threading.Event()
        listener = _LastWords()

        def tell() -> None:
            while not ended.wait(_TELL_EVERY_S):
                said = f" {listener.said}" if listener.said else ""
                self._say(f"{_LOADING} {time.monotonic() - begun:.0f} s.{said}")

        self._say(_LOADING)
        logger.addHandler(listener)
        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()  # its last words are not to come after what is shown next
            logger.removeHandler(listener)


class _LastWords(logging.Handler):
    """Keeps the last line that the library has logged."""

    said = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.said = redact(record.getMessage()).splitlines()[-1][:200] if record.getMessage() else ""
