"""A small Gradio page of ours: it listens on this machine alone; others come in through a link behind the gate."""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

from fastsd_helpers.errors import FastSDError, SettingsError, needs_package
from fastsd_helpers.processes import LocalProcess
from fastsd_helpers.runtime import logger
from fastsd_helpers.tunnels.closed import GRADIO_CLOSED
from fastsd_helpers.tunnels.gate.login import Login
from fastsd_helpers.tunnels.ports import PortNote, forget_port, note_port
from fastsd_helpers.tunnels.settings import TunnelConfig
from fastsd_helpers.tunnels.tunnel import Tunnel, open_tunnel

__all__ = ["LocalPage", "import_gradio"]


class LocalPage:
    """A running page.

    Args:
        blocks: the page, a gradio.Blocks that is not started.
        port: where it listens on 127.0.0.1; 0: any free one.
        login: what the page itself asks for on this machine; None: nothing. A link's visitors enter it once.

    Attributes:
        local_url: its address on this machine.
        port: where it listens.
        login: see above.
        tunnel: its public link, when it has one.
        problem: why it has none, when one was wanted.

    Raises:
        SettingsError: the port cannot be used.
    """

    def __init__(self, blocks: Any, port: int = 0, *, login: Login | None = None) -> None:
        self._blocks, self.login = blocks, login
        self.tunnel: Tunnel | None = None
        self.problem: FastSDError | None = None
        self._closed = threading.Event()
        try:
            with _no_proxy():
                _app, self.local_url, _public = blocks.launch(
                    server_name="127.0.0.1",
                    server_port=port or None,
                    share=False,
                    ssr_mode=False,  # else Node.js is started where it is found, with the whole environment
                    auth=(login.user, login.password) if login else None,
                    prevent_thread_lock=True,
                    quiet=True,
                    inbrowser=False,
                )
        except OSError as err:
            raise SettingsError(f"Port {port} cannot be used: {err}.", "Give another --port, or 0.") from err
        self.port: int = blocks.server_port
        note_port(self.port, PortNote(LocalProcess.me(), login))

    @property
    def url(self) -> str:
        """Its public address when it is shared, else the one on this machine."""
        return self.tunnel.url if self.tunnel is not None else self.local_url

    def share(self, config: TunnelConfig) -> None:
        """Make a public link behind a login; when that fails the page stays, and `problem` says why.

        What cannot work at all is for `require_shareable` to refuse, before the page's model is loaded.

        Args:
            config: kind, user, password and minutes of the link.
        """
        try:
            self.tunnel = open_tunnel(
                self.port, config=config, login=self.login, upstream_login=self.login, closed=GRADIO_CLOSED
            )
        except FastSDError as err:
            self.problem = err
            logger.warning("The page is not shared, and stays open at %s. %s %s", self.local_url, err.problem, err.hint)
        except BaseException:  # interrupted: whoever opened the page never gets it
            self.close()
            raise

    def block(self) -> str:
        """Where to open it, with user and password, in one block to copy; it is for no log."""
        if self.tunnel is not None and self.tunnel.login is not None:
            return self.tunnel.block()
        lines = [self.tunnel.block() if self.tunnel is not None else f"Link:      {self.local_url}"]
        if self.login is not None:
            lines += self.login.lines()
        if self.problem is not None:
            lines.append(f"Not shared: {self.problem.problem} {self.problem.hint}")
        return "\n".join(lines)

    def about(self) -> dict[str, Any]:
        """The same for programs; the password is in clear, so it is for no log."""
        shared = self.tunnel
        login = shared.login if shared is not None and shared.login is not None else self.login
        return {
            "url": self.url,
            "local_url": self.local_url,
            "kind": shared.kind if shared is not None else None,
            "user": login.user if login else None,
            "password": login.password if login else None,
            "visitor_password": shared.visitor_password if shared is not None else None,
            "expires": shared.expires.isoformat() if shared is not None and shared.expires else None,
            "problem": f"{self.problem.problem} {self.problem.hint}" if self.problem is not None else None,
        }

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is closed; False when it is open still after `timeout_s` seconds.

        Args:
            timeout_s: seconds; None: for as long as it is open.

        Returns:
            Whether it is closed.
        """
        return self._closed.wait(timeout_s)

    def close(self) -> None:
        """Close the link and the page; calling it twice is harmless."""
        if self.tunnel is not None:
            self.tunnel.close()
        if not self._closed.is_set():
            forget_port(self.port)
        self._blocks.close(verbose=False)
        self._closed.set()

    def __enter__(self) -> "LocalPage":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def import_gradio(what: str, hint: str) -> Any:
    """The module gradio, for a page of ours.

    Args:
        what: that needs it, in words.
        hint: what to do where it is absent.

    Raises:
        DependencyMissing: it is not installed, or cannot be loaded. As for `needs_package`.
    """
    with needs_package(what, hint), _no_proxy():  # it makes HTTP clients at import, which a proxy's address can end
        import gradio
    return gradio


@contextlib.contextmanager
def _no_proxy() -> Iterator[None]:
    """Gradio asks its own page whether it is there, and would ask a proxy, which has a 127.0.0.1 of its own."""
    names = ("NO_PROXY", "no_proxy")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "*"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
