"""What can be known of a link before anything is started for it: whether it can work here at all."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from fastsd_helpers.errors import DependencyMissing, SettingsError, TunnelError
from fastsd_helpers.runtime import in_notebook, where
from fastsd_helpers.tunnels.gate.login import Login, choose_login
from fastsd_helpers.tunnels.services.kinds import frpc_places, require_package, require_token
from fastsd_helpers.tunnels.services.node_packages import keep_client, node_missing
from fastsd_helpers.tunnels.services.programs import keep_program, known_program, own_program
from fastsd_helpers.tunnels.settings import KINDS, TunnelConfig

__all__ = ["require_shareable"]


def require_shareable(config: TunnelConfig, kind: str | None = None, *, login: Login | None = None) -> None:
    """Refuse a link that cannot work here, before a model is loaded or a web UI started for it.

    The programs of the one service that was asked for are fetched now, where they are not here. "auto" is refused only
    when none of its services can work, and fetches nothing.

    Args:
        config: of the link.
        kind: one of KINDS; that of `config` when None.
        login: the one that the link will have; that of `config` when None.

    Raises:
        SettingsError: no such kind, or a user or password that no link can have.
        DependencyMissing: the gate's package is not installed.
        TunnelError: the token, the package or the program that it needs is missing, or it is for another place than
            this.
    """
    kind = kind or config.kind
    if kind not in KINDS:
        raise SettingsError(f"There is no tunnel service named {kind!r}.", f"Choose {', '.join(KINDS)}.")
    if login is None and config.access == "password" and kind != "colab":
        choose_login(config.user, config.password)
    if kind != "colab" and importlib.util.find_spec("aiohttp") is None:
        raise DependencyMissing("A link needs the package aiohttp, which is not installed.", "Run: pip install aiohttp")
    if kind != "auto":
        _CHECKS[kind](config, True)
        return
    problems = []
    for name in ("ngrok", "gradio", "cloudflared", "localtunnel"):
        try:
            _CHECKS[name](config, False)
            return
        except TunnelError as err:
            problems.append(f"{name}: {err.problem.rstrip('.')}")
    raise TunnelError(
        f"No service can open a tunnel here. {'; '.join(problems)}.",
        "Install one of them (pip install gradio is the simplest), or give an ngrok token.",
    )


def _check_ngrok(config: TunnelConfig, fetch: bool) -> None:
    require_token(config)
    require_package("ngrok")
    _require_program("ngrok", fetch)


def _check_gradio(config: TunnelConfig, fetch: bool) -> None:
    require_package("gradio")
    _require_program("frpc", fetch, **frpc_places())


def _check_cloudflared(config: TunnelConfig, fetch: bool) -> None:
    _require_program("cloudflared", fetch)


def _require_program(name: str, fetch: bool, **places: list[Path]) -> None:
    if own_program(name):
        return
    if fetch:
        keep_program(name, **places)
    else:
        known_program(name)


def _check_localtunnel(config: TunnelConfig, fetch: bool) -> None:
    if own_program("localtunnel"):
        return
    problem = node_missing()
    if problem is not None:
        raise problem
    if fetch:
        keep_client(within_s=config.wait_s)


def _check_colab(config: TunnelConfig, fetch: bool) -> None:
    if where() != "colab" or not in_notebook():
        raise TunnelError(
            "Colab's own link exists only in a Colab notebook, and this is not one.",
            "Choose another kind: auto, ngrok, gradio, cloudflared, localtunnel.",
        )


_CHECKS: dict[str, Callable[[TunnelConfig, bool], None]] = {
    "ngrok": _check_ngrok,
    "gradio": _check_gradio,
    "cloudflared": _check_cloudflared,
    "localtunnel": _check_localtunnel,
    "colab": _check_colab,
}
