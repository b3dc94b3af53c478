"""A public link to a running web UI, or to whatever listens at a port of this machine."""

from collections.abc import Sequence
from typing import Any

from fastsd_helpers.runtime import secret
from fastsd_helpers.tunnels import Tunnel, TunnelConfig, choose_login, open_tunnel
from fastsd_helpers.tunnels.closed import GRADIO_CLOSED, UNKNOWN_CLOSED
from fastsd_helpers.tunnels.gate.passing import ClosedPath
from fastsd_helpers.tunnels.ports import read_port
from fastsd_helpers.webui.catalog import WebUI, find_ui
from fastsd_helpers.webui.running.background import BackgroundLink, hold_link
from fastsd_helpers.webui.running.process import LocalUI, find_at_port

__all__ = ["share", "share_in_background", "share_port"]


def share(running: LocalUI, config: TunnelConfig | None = None, **more: Any) -> Tunnel:
    """Give a running web UI a public link behind the gate, with the same user and password as its own login.

    Visitors log in once; what AUTOMATIC1111 leaves open to strangers (`/internal/sysinfo` and others) is closed too.
    The paths that administer it are closed for all, unless it was started with allow_admin.

    Args:
        running: the web UI, as `launch` or `find_running` gives it.
        config: kind and minutes of the link; the defaults when None.
        **more: what else `open_tunnel` takes.

    Returns:
        The link, open until `close`.
    """
    upstream = running.login if running.ui.has_login else None
    found = find_at_port(running.port)
    more.setdefault("closed", _closed_of(running.ui, admin=found is not None and found[0].admin))
    tunnel = open_tunnel(running.port, config=config, login=running.login, upstream_login=upstream, **more)
    if tunnel.kind == "colab":
        tunnel.login = upstream  # no gate is in front of this link, so the web UI's own login is what it asks for
    running.tunnel = tunnel
    return tunnel


def _closed_of(ui: WebUI, *, admin: bool) -> Sequence[ClosedPath]:
    return UNKNOWN_CLOSED if admin else ui.closed


def share_in_background(running: LocalUI, config: TunnelConfig | None = None) -> BackgroundLink:
    """As `share`, but another process holds the link, which so outlives this one; `stop` ends it with the web UI.

    Args:
        running: the web UI, as `launch` or `find_running` gives it.
        config: kind and minutes of the link; the defaults when None.

    Raises:
        TunnelError: no service gave a link.
    """
    return hold_link(running.port, running.places.run, config or TunnelConfig(), running.login)


def share_port(port: int, config: TunnelConfig | None = None, **more: Any) -> Tunnel:
    """Give whatever listens at a port of this machine a public link; what of ours runs there keeps its one login.

    Visitors enter the own user and password of the web UI or page, unless others were chosen here; either way its own
    login is entered for them, so that its API works too. What `share` closes to visitors is closed here too.

    Args:
        port: where it listens, on 127.0.0.1.
        config: as for `open_tunnel`, which says what is raised.
        more: as for `open_tunnel`, which says what is raised.

    Returns:
        The link, open until `close`.
    """
    config = config or TunnelConfig()
    found, note = find_at_port(port), read_port(port)
    own = found[1] if found else note.login if note else None
    if found:
        closed = _closed_of(find_ui(found[0].ui), admin=found[0].admin)
    else:
        closed = GRADIO_CLOSED if note else UNKNOWN_CLOSED  # only our own pages leave a note without a run
    more.setdefault("closed", closed)
    if own is None or config.access == "anyone":  # to strangers its own login stays closed
        return open_tunnel(port, config=config, **more)
    user = config.user if config.user != TunnelConfig().user else own.user
    login = choose_login(user, config.password or secret("FASTSD_PASSWORD") or own.password)
    tunnel = open_tunnel(port, config=config, login=login, upstream_login=own, **more)
    if tunnel.kind == "colab":
        tunnel.login = own  # no gate is in front of this link
    return tunnel
