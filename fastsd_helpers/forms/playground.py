"""Try the model: a button that opens the playground for the session, and one that closes it and frees its memory."""

import dataclasses

from fastsd_helpers.forms.widgets.form import require
from fastsd_helpers.forms.widgets.page_view import PageView
from fastsd_helpers.playground import Page, PlaygroundConfig, open_playground
from fastsd_helpers.runtime import in_notebook, where
from fastsd_helpers.sessions import Session

__all__ = ["offer_playground", "show_playground"]


def show_playground(config: PlaygroundConfig, session: Session) -> PageView[Page]:
    """Offer the playground for a session's model; it is opened by its button, so that "Run all" does not wait for it.

    In Colab the link is Colab's own, which only this notebook's user can open, unless the settings share it.

    Args:
        config: what the form shows, as its `config()` gives it.
        session: the session, as `open_session` gives it.

    Returns:
        The view with its button; as a cell's last line it is displayed.

    Raises:
        SettingsError: these are the settings of another form.
    """
    require(config, PlaygroundConfig)
    session.require_here()
    # The folder, because the name alone is looked for among the sessions in the usual place.
    return offer_playground(config, str(session.folder))


def offer_playground(config: PlaygroundConfig, ref: str) -> PageView[Page]:
    """Offer the playground for any model (key, Hub id, folder), the built-in one when `ref` is empty."""
    if config.share == "no" and where() == "colab" and in_notebook():
        config = dataclasses.replace(config, share="colab")
    return PageView(
        "playground",
        lambda: open_playground(ref, config),
        lambda page: (page.tunnel.url if page.tunnel is not None else page.url, page.block()),
    )
