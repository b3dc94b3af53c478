"""Settings of a public link."""

from dataclasses import dataclass
from typing import Literal

from fastsd_helpers.options import check, option

__all__ = ["KINDS", "TunnelConfig"]

KINDS: tuple[str, ...] = ("auto", "ngrok", "gradio", "cloudflared", "localtunnel", "colab")


@dataclass(frozen=True)
class TunnelConfig:
    """How a program on this machine gets a link, and who may use it."""

    kind: Literal["auto", "ngrok", "gradio", "cloudflared", "localtunnel", "colab"] = option(
        "auto", help="service that makes the link; auto tries them in order; colab: for you alone"
    )
    access: Literal["password", "anyone"] = option(
        "password", help="who may use the link; 'anyone' means every stranger who finds it"
    )
    user: str = option("fastsd", help="user name that visitors enter")
    password: str | None = option(None, help="password that visitors enter; empty: a strong one is made", secret=True)
    ngrok_token: str | None = option(None, help="your ngrok authtoken, from dashboard.ngrok.com", secret=True)
    minutes: int = option(0, help="close the link after so many minutes; 0: when the program stops", low=0, high=10080)
    wait_s: int = option(45, help="seconds to wait for each service", low=1, high=300, advanced=True)
    share_server: str = option("", help="HOST:PORT of a gradio share server of your own", advanced=True)
    localtunnel_server: str = option("https://localtunnel.me", help="address of the localtunnel server", advanced=True)

    def __post_init__(self) -> None:
        server, problems = self.share_server, []
        if server and not (server.count(":") == 1 and server.rpartition(":")[2].isdigit()):
            problems.append(f"share_server (--share-server) is {server!r}; it must be HOST:PORT")
        if not self.localtunnel_server.startswith(("http://", "https://")):
            problems.append(f"localtunnel_server (--localtunnel-server) is {self.localtunnel_server!r}; it is no link")
        check(self, problems)
