"""Settings of a public link."""

import re
from dataclasses import dataclass
from typing import Literal

from fastsd_helpers.options import check, option

__all__ = ["KINDS", "TunnelConfig"]

KINDS: tuple[str, ...] = ("auto", "ngrok", "gradio", "cloudflared", "localtunnel", "colab")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_HOST_NAME = re.compile(rf"(?=.{{4,253}}$)({_LABEL.pattern}\.)+[a-z][a-z0-9-]*[a-z0-9]")


@dataclass(frozen=True)
class TunnelConfig:
    """How a program on this machine gets a link, and who may use it."""

    kind: Literal["auto", "ngrok", "gradio", "cloudflared", "localtunnel", "colab"] = option(
        "auto", help="tunnel service; auto tries them in order; colab: a link for you alone"
    )
    access: Literal["password", "anyone"] = option(
        "password", help="who may use the link; 'anyone': no login, every unauthenticated client that finds it"
    )
    user: str = option("fastsd", help="user name of the login")
    password: str | None = option(None, help="password of the login; empty: a strong one is generated", secret=True)
    ngrok_token: str | None = option(None, help="your ngrok authtoken, from dashboard.ngrok.com", secret=True)
    minutes: int = option(
        0, help="close the link after this many minutes; 0: when the program stops", low=0, high=10080
    )
    wait_s: int = option(45, help="timeout in seconds for each service", low=1, high=300, advanced=True)
    share_server: str = option("", help="HOST:PORT of your own gradio share server", advanced=True)
    ngrok_domain: str = option(
        "", help="your account's own domain at ngrok, such as name.ngrok-free.app, so that the address stays the same"
    )
    subdomain: str = option(
        "", help="subdomain to request from localtunnel, so that the address stays the same", advanced=True
    )
    localtunnel_server: str = option("https://localtunnel.me", help="address of the localtunnel server", advanced=True)

    def __post_init__(self) -> None:
        server, problems = self.share_server, []
        if server and not (server.count(":") == 1 and server.rpartition(":")[2].isdigit()):
            problems.append(f"share_server (--share-server) is {server!r}; it must be HOST:PORT")
        if not self.localtunnel_server.startswith(("http://", "https://")):
            problems.append(
                f"localtunnel_server (--localtunnel-server) is {self.localtunnel_server!r}; it is not a link"
            )
        if self.ngrok_domain and not _HOST_NAME.fullmatch(str(self.ngrok_domain)):
            problems.append(
                f"ngrok_domain (--ngrok-domain) is {self.ngrok_domain!r}; it must be a name such as "
                "name.ngrok-free.app, without https:// and path"
            )
        # localtunnel's server takes names of 4 to 63 characters.
        if self.subdomain and not (_LABEL.fullmatch(str(self.subdomain)) and len(str(self.subdomain)) >= 4):
            problems.append(
                f"subdomain (--subdomain) is {self.subdomain!r}; it must have 4 to 63 lower-case letters, digits and "
                "hyphens"
            )
        for name, kind in (("ngrok_domain", "ngrok"), ("subdomain", "localtunnel")):
            if getattr(self, name) and self.kind not in (kind, "auto"):
                problems.append(f"{name} (--{name.replace('_', '-')}) is for {kind}, and kind is {self.kind}")
        check(self, problems)
