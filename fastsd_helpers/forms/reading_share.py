"""Share the reader: a button that opens its small page, with a login, and one that closes it."""

import html
from typing import Any

from fastsd_helpers.errors import FastSDError
from fastsd_helpers.forms.fields import load_widgets
from fastsd_helpers.forms.form import require
from fastsd_helpers.runtime import colab_link, in_notebook, where
from fastsd_helpers.trocr.reading_session import ReadingSession, choose_reader
from fastsd_helpers.trocr.serve import ServeConfig, Served, serve

__all__ = ["ShareView", "share_reader"]


def share_reader(config: ServeConfig, session: ReadingSession) -> "ShareView":
    """Offer the page of the session's reader; its button opens it, so that "Run all" does not wait for it.

    It is the fine-tuned reader where there is one. In Colab the link is Colab's own, which only this notebook's user
    can open, unless `share` makes a public one.

    Raises:
        SettingsError: these are the settings of another form.
    """
    require(config, ServeConfig)
    return ShareView(config, session)


class ShareView:
    """The buttons, and where the page is once it is open.

    Attributes:
        served: the open page, or None.
    """

    def __init__(self, config: ServeConfig, session: ReadingSession) -> None:
        self.served: Served | None = None
        self._config, self._session = config, session
        widgets = load_widgets()
        layout = widgets.Layout(width="190px")
        self._open = widgets.Button(description="Open the page", icon="play", layout=layout)
        self._open.add_class("fastsd-open-page")
        self._close = widgets.Button(description="Close it", icon="stop", layout=layout, disabled=True)
        self._message = widgets.HTML()
        self._open.on_click(lambda _button: self.open())
        self._close.on_click(lambda _button: self.close())
        self.box = widgets.VBox([widgets.HBox([self._open, self._close]), self._message])

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.box)

    def open(self) -> None:
        """Load the reader and open its page; what goes wrong is shown as a sentence."""
        from fastsd_helpers.trocr.reader import Reader

        if self.served is not None:
            return
        self._open.disabled = True
        self._message.value = "Loading the reader…"
        try:
            self.served = serve(Reader(self._model()), self._config)
            self._message.value = self._where(self.served)
        except FastSDError as err:
            self._message.value = html.escape(f"✋ {err.problem} {err.hint}")
            self.close()
            return
        self._close.disabled = False

    def _model(self) -> str:
        path = self._session.folder / str((self._session.record.get("taught") or {}).get("path", ""))
        if (path / "config.json").is_file():
            return str(path)
        chosen = self._session.record.get("reader")
        return str(chosen) if chosen else choose_reader("auto", own_pictures=True)[0]

    def _where(self, served: Served) -> str:
        url = served.url
        if not self._config.share and where() == "colab" and in_notebook():
            url = colab_link(int(url.rstrip("/").rsplit(":", 1)[1])) or url
        link = f'<a href="{html.escape(url, quote=True)}" target="_blank">{html.escape(url)}</a>'
        # The one place where the password is shown; the log never has it.
        login = f"user {served.user}, password {served.password}" if served.password else "without a login"
        return f"<b>Open: {link}</b><pre class='fastsd-login'>{html.escape(login)}</pre>"

    def close(self) -> None:
        """Close the page and its link."""
        served: Any = self.served
        self.served = None
        if served is not None:
            served.app.close()
            self._message.value = "Closed."
        self._open.disabled, self._close.disabled = False, True
