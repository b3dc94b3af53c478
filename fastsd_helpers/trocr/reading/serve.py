"""A small Gradio page around a reader: drop a line or a page, see its text. With a login, unless it is switched off."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from fastsd_helpers.images.files import picture_field
from fastsd_helpers.options import check, option
from fastsd_helpers.trocr.model.line import Line
from fastsd_helpers.trocr.pages.inputs import PICTURE_SUFFIXES, Item, gather
from fastsd_helpers.trocr.reading.rows import read_items
from fastsd_helpers.tunnels import LocalPage, TunnelConfig, choose_login, import_gradio, require_shareable

__all__ = ["ServeConfig", "Served", "build_page", "require_servable", "serve"]

_NEEDS = ("The page", "Run: fastsd install trocr")


@dataclass(frozen=True)
class ServeConfig:
    """Settings of the shared page."""

    port: int = option(7860, help="local port; 0: any free one", low=0, high=65535)
    user: str = option("reader", help="user name of the login")
    login: bool = option(True, help="ask for user and password; always on when shared")
    share: Literal["no", "auto", "ngrok", "gradio", "cloudflared", "localtunnel", "colab"] = option(
        "no", help="open a tunnel: a public link with a login; auto tries the services in order"
    )
    password: str | None = option(None, help="password of the login; empty: a strong one is generated", secret=True)

    def __post_init__(self) -> None:
        if isinstance(self.share, bool):  # as it was saved by earlier versions
            object.__setattr__(self, "share", "auto" if self.share else "no")
        problems = []
        if self.share != "no" and not self.login:
            problems.append("share (--share) makes the page public, and login is off: a public page needs one")
        if self.login and not str(self.user).strip():
            problems.append("user (--user) is empty")
        check(self, problems)


class Served(LocalPage):
    """A running page: `url` is where it is, `user` and `password` what to log in with; `close()` ends it."""

    @property
    def user(self) -> str | None:
        """User name of its login; None without one."""
        return self.login.user if self.login else None

    @property
    def password(self) -> str | None:
        """Password of its login; None without one."""
        return self.login.password if self.login else None

    @property
    def app(self) -> Any:
        """The gradio.Blocks."""
        return self._blocks


def build_page(reader: Any) -> Any:
    """Make the page (a gradio.Blocks), not started."""
    gradio = import_gradio(*_NEEDS)

    def read(picture: Any, whole_page: bool) -> tuple[str, list[list[Any]]]:
        if picture is None:
            raise gradio.Error("Drop an image first.", print_exception=False)
        return answer(gather([picture]), whole_page)

    def read_file(file: Any, whole_page: bool) -> tuple[str, list[list[Any]]]:
        if file is None:
            raise gradio.Error("Drop a file first.", print_exception=False)
        return answer(gather(file), whole_page)

    def answer(items: Iterable[Item], whole_page: bool) -> tuple[str, list[list[Any]]]:
        lines = [line for item in items for line in _read_item(reader, item, whole_page)]
        if all(line.problem for line in lines):
            raise gradio.Error(lines[0].problem if lines else "There is nothing to read in it.", print_exception=False)
        rows = [[line.text, round(line.confidence, 3), line.problem or " ".join(line.notes)] for line in lines]
        return "\n".join(line.text for line in lines if not line.problem), rows

    with gradio.Blocks(title="Handwriting recognition", analytics_enabled=False) as page:
        gradio.Markdown(f"### Handwriting recognition: {reader.checkpoint.folder.name}")
        with gradio.Row():
            with gradio.Column():
                picture = picture_field(gradio, "A line, or a page")
                whole = gradio.Checkbox(label="It is a whole page (otherwise it is looked at)")
                button = gradio.Button("Read", variant="primary")
                file = gradio.File(label="or a file: a PDF, a HEIC", file_types=[*PICTURE_SUFFIXES, ".pdf"])
                button_of_file = gradio.Button("Read the file")
            with gradio.Column():
                text = gradio.Textbox(label="Text", lines=4)
                table = gradio.Dataframe(headers=["text", "confidence", "notes"], label="Lines", interactive=False)
        button.click(read, [picture, whole], [text, table])
        button_of_file.click(read_file, [file, whole], [text, table])
    return page


def _read_item(reader: Any, item: Item, whole_page: bool) -> list[Line]:
    """The lines of an image, found first where it is, or looks like, a page; a page without any is read as a line."""
    return [line for found in read_items(reader, [item], "pages" if whole_page else "auto") for line in found]


def require_servable(config: ServeConfig, tunnel: TunnelConfig | None = None) -> None:
    """Refuse settings with which the page cannot be served or shared here, before its model is loaded.

    Raises:
        SettingsError: a user or password that no login can have.
        DependencyMissing: gradio is not installed.
        FastSDError: what `tunnels.require_shareable` raises.
    """
    import_gradio(*_NEEDS)
    link = _link(config, tunnel)
    if config.login:
        choose_login(config.user, config.password)
    if link is not None:
        require_shareable(link)


def _link(config: ServeConfig, tunnel: TunnelConfig | None) -> TunnelConfig | None:
    if config.share == "no":
        return None
    return dataclasses.replace(
        tunnel or TunnelConfig(), kind=config.share, user=config.user, password=config.password, access="password"
    )


def serve(reader: Any, config: ServeConfig | None = None, *, tunnel: TunnelConfig | None = None) -> Served:
    """Start the page on this machine and return at once; a password that was not given is made up anew every time.

    It listens on 127.0.0.1 alone; other machines come in through `config.share`, by the same gate and services as
    everything else. A link that fails leaves the page open on this machine, and is in `Served.problem`.

    Args:
        tunnel: settings of the public link; kind, user and password are those of `config`.

    Raises:
        SettingsError: the port is taken.
        FastSDError: what `require_servable` raises.
    """
    config = config or ServeConfig()
    require_servable(config, tunnel)
    page = Served(
        build_page(reader).queue(max_size=32),
        config.port,
        login=choose_login(config.user, config.password) if config.login else None,
    )
    link = _link(config, tunnel)
    if link is not None:
        page.share(link)
    return page
