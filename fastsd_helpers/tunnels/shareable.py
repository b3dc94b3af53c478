"""What can be known of a link before anything is started for it: whether it can work here at all."""

import importlib.util

from fastsd_helpers.errors import DependencyMissing, TunnelError
from fastsd_helpers.runtime import in_notebook, where
from fastsd_helpers.tunnels.gate.login import choose_login
from fastsd_helpers.tunnels.services.kinds import SERVICES, frpc_places, require_package, require_token
from fastsd_helpers.tunnels.services.node_packages import keep_client, node_missing
from fastsd_helpers.tunnels.services.programs import keep_program, known_program, own_program
from fastsd_helpers.tunnels.settings import TunnelConfig

__all__ = ["require_shareable"]


def require_shareable(config: TunnelConfig) -> None:
    """Refuse a link that cannot work here, before a model is loaded or a web UI started for it.

    The programs of the one service that was asked for are fetched now, where they are not here. "auto" is refused only
    when none of its services can work, and fetches nothing.

    Args:
        config: kind, user and password of the link.

    Raises:
        SettingsError: a user or password that no link can have.
        DependencyMissing: the gate's package is not installed.
        TunnelError: the token, the package or the program that it needs is missing, or it is for another place than
            this.
    """
    kind = config.kind
    if config.access == "password" and kind != "colab":
        choose_login(config.user, config.password)
    if kind != "colab" and importlib.util.find_spec("aiohttp") is None:
        raise DependencyMissing("A link needs the package aiohttp, which is not installed.", "Run: pip install aiohttp")
    if kind != "auto":
        _check(kind, config, True)
        return
    problems = []
    for name in SERVICES:
        try:
            _check(name, config, False)
            return
        except TunnelError as err:
            problems.append(f"{name}: {err.problem.rstrip('.')}")
    raise TunnelError(
        f"No service can open a tunnel here. {'; '.join(problems)}.",
        "Install one of them (pip install gradio is the simplest), or give an ngrok token.",
    )


def _check(kind: str, config: TunnelConfig, fetch: bool) -> None:
    """Refuse one service that cannot work here; with `fetch` its program is brought."""
    if kind == "colab" and (where() != "colab" or not in_notebook()):
        raise TunnelError(
            "Colab's own link exists only in a Colab notebook, and this is not one.",
            "Choose another kind: auto, ngrok, gradio, cloudflared, localtunnel.",
        )
    if kind == "ngrok":
        require_token(config)
    if kind in ("ngrok", "gradio"):
        require_package(kind)
    if kind == "colab" or own_program(kind):
        return
    if kind == "localtunnel":
        if problem := node_missing():
            raise problem
        if fetch:
            keep_client(within_s=config.wait_s)
        return
    program, places = ("frpc", frpc_places()) if kind == "gradio" else (kind, {})
    if fetch:
        keep_program(program, **places)
    else:
        known_program(program)
