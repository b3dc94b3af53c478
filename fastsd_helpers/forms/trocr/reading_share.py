"""Share the reader: a button that opens its small page, with a login, and one that closes it."""

from fastsd_helpers.forms.widgets.form import require
from fastsd_helpers.forms.widgets.page_view import PageView
from fastsd_helpers.runtime import colab_link, in_notebook, where
from fastsd_helpers.trocr.reading.reader import Reader
from fastsd_helpers.trocr.reading.serve import ServeConfig, Served, serve
from fastsd_helpers.trocr.reading.session import ReadingSession

__all__ = ["share_reader"]


def share_reader(config: ServeConfig, session: ReadingSession) -> PageView[Served]:
    """Offer the page of the session's model; its button opens it, so that "Run all" does not wait for it.

    It is the fine-tuned model where there is one. In Colab the link is Colab's own, which only this notebook's user
    can open, unless `share` makes a public one.

    Args:
        config: what the form shows, as its `config()` gives it.
        session: the session, as `open_reading` gives it.

    Returns:
        The view with its button; as a cell's last line it is displayed.

    Raises:
        SettingsError: these are the settings of another form.
    """
    require(config, ServeConfig)

    def start() -> Served:
        return serve(Reader(session.reader), config)

    def told(page: Served) -> tuple[str, str]:
        url = page.url
        if config.share == "no" and where() == "colab" and in_notebook():
            url = colab_link(int(url.rstrip("/").rsplit(":", 1)[1])) or url
        login = f"user {page.user}, password {page.password}" if page.password else "without a login"
        return url, f"{login}\n{page.block()}" if page.tunnel is not None or page.problem is not None else login

    return PageView("page", start, told)
