"""Share the reader: a button that opens its small page, with a login, and one that closes it."""

from fastsd_helpers.forms.widgets.form import require
from fastsd_helpers.forms.widgets.page_view import PageView
from fastsd_helpers.runtime import colab_link, in_notebook, where
from fastsd_helpers.trocr.reading.serve import ServeConfig, Served, serve
from fastsd_helpers.trocr.reading.session import ReadingSession

__all__ = ["ShareView", "share_reader"]


def share_reader(config: ServeConfig, session: ReadingSession) -> "ShareView":
    """Offer the page of the session's model; its button opens it, so that "Run all" does not wait for it.

    It is the fine-tuned model where there is one. In Colab the link is Colab's own, which only this notebook's user
    can open, unless `share` makes a public one.

    Raises:
        SettingsError: these are the settings of another form.
    """
    require(config, ServeConfig)
    return ShareView(config, session)


class ShareView(PageView[Served]):
    """The buttons of the model's page."""

    def __init__(self, config: ServeConfig, session: ReadingSession) -> None:
        super().__init__("page", "Loading the model…")
        self._config, self._session = config, session

    def _start(self) -> Served:
        from fastsd_helpers.trocr.reading.reader import Reader

        return serve(Reader(self._session.reader), self._config)

    def _where(self, page: Served) -> tuple[str, str]:
        url = page.url
        if self._config.share == "no" and where() == "colab" and in_notebook():
            url = colab_link(int(url.rstrip("/").rsplit(":", 1)[1])) or url
        login = f"user {page.user}, password {page.password}" if page.password else "without a login"
        if page.tunnel is not None or page.problem is not None:
            login = f"{login}\n{page.block()}"
        return url, login
