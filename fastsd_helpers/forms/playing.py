"""Try the model: a button that opens the playground for the session, and one that closes it and frees its memory."""

import dataclasses
import html
from typing import Any

from fastsd_helpers.errors import FastSDError
from fastsd_helpers.forms.fields import load_widgets
from fastsd_helpers.forms.form import require
from fastsd_helpers.playground import Page, PlaygroundConfig, open_playground
from fastsd_helpers.runtime import in_notebook, where
from fastsd_helpers.sessions import Session

__all__ = ["PlayView", "offer_playground", "show_playground"]


def show_playground(config: PlaygroundConfig, session: Session) -> "PlayView":
    """Offer the playground for a session's model; it is opened by its button, so that "Run all" does not wait for it.

    In Colab the link is Colab's own, which only this notebook's user can open, unless the settings share it.

    Raises:
        SettingsError: these are the settings of another form.
    """
    require(config, PlaygroundConfig)
    # The folder, because the name alone is looked for among the sessions in the usual place.
    return offer_playground(config, str(session.folder))


def offer_playground(config: PlaygroundConfig, ref: str) -> "PlayView":
    """Offer the playground for any model (key, Hub id, folder), the built-in one when `ref` is empty."""
    if config.share == "no" and where() == "colab" and in_notebook():
        config = dataclasses.replace(config, share="colab")
    return PlayView(config, ref)


class PlayView:
    """The buttons, and where the page is once it is open.

    Attributes:
        page: the open playground, or None.
    """

    def __init__(self, config: PlaygroundConfig, ref: str) -> None:
        self.page: Page | None = None
        self._config, self._ref = config, ref
        widgets = load_widgets()
        layout = widgets.Layout(width="190px")
        self._open = widgets.Button(description="Open the playground", icon="play", layout=layout)
        self._close = widgets.Button(description="Close it", icon="stop", layout=layout, disabled=True)
        self._message = widgets.HTML()
        self._open.on_click(lambda _button: self.open())
        self._close.on_click(lambda _button: self.close())
        self.box = widgets.VBox([widgets.HBox([self._open, self._close]), self._message])

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.box)

    def open(self) -> None:
        """Load the model and open its page; what goes wrong is shown as a sentence."""
        if self.page is not None:
            return
        self._open.disabled = True
        self._message.value = "Loading the model…"
        try:
            self.page = open_playground(self._ref, self._config)
        except FastSDError as err:
            self._message.value = html.escape(f"✋ {err.problem} {err.hint}")
            self._open.disabled = False
            return
        self._message.value = self._where(self.page)
        self._close.disabled = False

    @staticmethod
    def _where(page: Any) -> str:
        url = page.tunnel.url if page.tunnel is not None else page.url
        link = f'<a href="{html.escape(url, quote=True)}" target="_blank">{html.escape(url)}</a>'
        # With a public link come a user and a password, which are meant to be read here.
        return f"<b>Open: {link}</b><pre>{html.escape(page.block())}</pre>"

    def close(self) -> None:
        """Close the page and its link."""
        if self.page is None:
            return
        page, self.page = self.page, None
        page.close()
        self._message.value = "Closed."
        self._open.disabled, self._close.disabled = False, True
