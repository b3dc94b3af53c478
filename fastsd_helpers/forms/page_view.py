"""A button that opens a small page of ours, and one that closes it; so "Run all" does not wait for a model."""

import html
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from fastsd_helpers.errors import FastSDError
from fastsd_helpers.forms.view import View, load_widgets, make_button, make_frame

__all__ = ["PageView"]

Page = TypeVar("Page")


class PageView(View, ABC, Generic[Page]):
    """The buttons, and where the page is once it is open.

    Attributes:
        page: the open page, or None.
    """

    def __init__(self, name: str, loading: str) -> None:
        self.page: Page | None = None
        self._loading = loading
        widgets = load_widgets()
        self._open = make_button(f"Open the {name}", icon="play", name="fastsd-open-page")
        self._close = make_button("Close it", icon="stop")
        self._close.disabled = True
        self._message = widgets.HTML()
        self._open.on_click(lambda _button: self.open())
        self._close.on_click(lambda _button: self.close())
        self.box = make_frame(widgets.HBox([self._open, self._close]), self._message)

    def open(self) -> None:
        """Load the model and open the page; what goes wrong is shown as a sentence."""
        if self.page is not None:
            return
        self._open.disabled = True
        self._say(self._loading)
        try:
            self.page = self._start()
            url, login = self._where(self.page)
        except FastSDError as err:
            self.close()
            self._say_error(err)
            return
        link = f'<a href="{html.escape(url, quote=True)}" target="_blank">{html.escape(url)}</a>'
        # The one place where a password is shown, which is meant to be read here; the log never has it.
        self._message.value = f"<b>Open: {link}</b><pre class='fastsd-login'>{html.escape(login)}</pre>"
        self._close.disabled = False

    def close(self) -> None:
        """Close the page and its link."""
        page, self.page = self.page, None
        if page is not None:
            self._end(page)
            self._say("Closed.")
        self._open.disabled, self._close.disabled = False, True

    @abstractmethod
    def _start(self) -> Page:
        """Load the model and start the page."""

    @abstractmethod
    def _where(self, page: Page) -> tuple[str, str]:
        """Its address, and what to tell of its login."""

    @abstractmethod
    def _end(self, page: Page) -> None:
        """Close it."""
