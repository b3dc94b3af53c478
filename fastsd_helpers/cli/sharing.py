"""The flags of a public link, the same for every command that can make one, and how a link is shown."""

import argparse
import json
from typing import Any

from fastsd_helpers.cli.passwords import given_password
from fastsd_helpers.options import options_of

__all__ = ["add_link_flags", "add_share_flag", "link_settings", "show", "show_link"]

# What of a link's settings is offered where the link is not the whole command; `fastsd tunnel` has them all.
_OFFERED = ("ngrok_domain", "subdomain")


def add_share_flag(group: Any, about: str) -> None:
    """Add `--share [KIND]` and `--no-share`; a bare `--share` is "auto", a kind is checked with the settings."""
    metavar = "auto|ngrok|gradio|cloudflared|localtunnel|colab"
    group.add_argument("--share", nargs="?", const="auto", metavar=metavar, default=argparse.SUPPRESS, help=about)
    no = {"action": "store_const", "const": "no", "default": argparse.SUPPRESS}
    group.add_argument("--no-share", dest="share", help="open no tunnel (no public link)", **no)


def add_link_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for an address that lasts."""
    from fastsd_helpers.tunnels import TunnelConfig

    group = parser.add_argument_group("with --share")
    for item in options_of(TunnelConfig):
        if item.name in _OFFERED:
            group.add_argument(
                item.flag, dest=f"link_{item.name}", metavar="TEXT", default=argparse.SUPPRESS, help=item.help
            )


def link_settings(
    chosen: argparse.Namespace, kind: str | None, *, user: str | None = None, password: str | None = None
) -> Any:
    """The settings of the link (a TunnelConfig) that a command line asks for; None when it asks for none.

    Raises:
        SettingsError: they do not fit, or are given without a link that they could be of.
    """
    from fastsd_helpers.errors import SettingsError
    from fastsd_helpers.tunnels import TunnelConfig

    given: dict[str, Any] = {
        name: getattr(chosen, f"link_{name}") for name in _OFFERED if hasattr(chosen, f"link_{name}")
    }
    if kind in (None, "no"):
        if given:
            flag = next(iter(given)).replace("_", "-")
            raise SettingsError(f"--{flag} needs a public link, and none was requested.", "Add --share.")
        return None
    given |= {"kind": kind, "password": password or given_password(chosen)} | ({"user": user} if user else {})
    return TunnelConfig(**given)


def show_link(link: Any, as_json: bool, *, ends: str = "Ctrl-C closes it.") -> dict[str, Any]:
    """Show a link at once: the command goes on for as long as the link is wanted."""
    login = link.login
    data = {
        "url": link.url,
        "kind": link.kind,
        "user": login.user if login else None,
        "password": login.password if login else None,
        "visitor_password": link.visitor_password,
        "expires": link.expires.isoformat() if link.expires else None,
    }
    show(json.dumps(data) if as_json else f"{link.block()}\n{link.note}\n{ends}")
    return data


def show(text: str) -> None:
    """Write to standard output at once."""
    print(text, flush=True)
