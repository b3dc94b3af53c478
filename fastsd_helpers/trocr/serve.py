"""A small Gradio page around a reader: drop a line or a page, see its text. With a login, unless it is switched off."""

import logging
import secrets
from dataclasses import dataclass
from typing import Any

from fastsd_helpers.errors import SettingsError, needs_package
from fastsd_helpers.options import check, option
from fastsd_helpers.picture_files import picture_field

__all__ = ["ServeConfig", "Served", "build_page", "serve"]

logger = logging.getLogger("fastsd_helpers")


@dataclass(frozen=True)
class ServeConfig:
    """Settings of the shared page."""

    port: int = option(7860, help="port; 0 takes a free one", low=0, high=65535)
    user: str = option("reader", help="user name of the login")
    login: bool = option(True, help="ask for user and password; never off when shared")
    share: bool = option(False, help="make a public link through Gradio's service")

    def __post_init__(self) -> None:
        problems = []
        if self.share and not self.login:
            problems.append("share (--share) makes the page public, and login is off: a public page needs one")
        if self.login and not str(self.user).strip():
            problems.append("user (--user) is empty")
        check(self, problems)


@dataclass(frozen=True)
class Served:
    """A running page: where it is and what to log in with; `app.close()` ends it."""

    url: str
    user: str | None
    password: str | None
    app: Any


def build_page(reader: Any) -> Any:
    """Make the page (a gradio.Blocks), not started."""
    with needs_package("The page", "Run: fastsd install trocr"):
        import gradio
    from fastsd_helpers.trocr.pages import read_page
    from fastsd_helpers.trocr.pictures import to_rgb

    def read(picture: Any, whole_page: bool) -> tuple[str, list[list[Any]]]:
        if picture is None:
            raise gradio.Error("Drop a picture first.")
        lines = list(read_page(reader, to_rgb(picture)).lines) if whole_page else reader.read([picture])
        if len(lines) == 1 and lines[0].problem:
            raise gradio.Error(lines[0].problem)
        rows = [[line.text, round(line.confidence, 3), " ".join(line.notes)] for line in lines]
        return "\n".join(line.text for line in lines), rows

    with gradio.Blocks(title="Handwriting reader", analytics_enabled=False) as page:
        gradio.Markdown(f"### Handwriting reader: {reader.checkpoint.folder.name}")
        with gradio.Row():
            with gradio.Column():
                picture = picture_field(gradio, "A line, or a page")
                whole = gradio.Checkbox(label="It is a whole page")
                button = gradio.Button("Read", variant="primary")
            with gradio.Column():
                text = gradio.Textbox(label="Text", lines=4)
                table = gradio.Dataframe(headers=["text", "confidence", "notes"], label="Lines", interactive=False)
        button.click(read, [picture, whole], [text, table])
    return page


def serve(reader: Any, config: ServeConfig | None = None) -> Served:
    """Start the page on this machine and return at once; the password is new every time.

    It listens on 127.0.0.1 alone; other machines come in through `share` or a tunnel.

    Raises:
        SettingsError: the port is taken.
    """
    config = config or ServeConfig()
    password = secrets.token_urlsafe(12) if config.login else None
    page = build_page(reader)
    try:
        _app, local, public = page.queue(max_size=32).launch(
            server_name="127.0.0.1",
            server_port=config.port or None,
            share=config.share,
            auth=(config.user, password) if password else None,
            prevent_thread_lock=True,
            quiet=True,
            inbrowser=False,
        )
    except OSError as err:
        raise SettingsError(f"Port {config.port} cannot be used: {err}.", "Give another --port, or 0.") from err
    return Served(public or local, config.user if password else None, password, page)
