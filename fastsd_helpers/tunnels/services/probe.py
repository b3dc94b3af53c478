"""Questions over HTTP with a real deadline: also when a name does not resolve or a server falls silent."""

import socket
import threading
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from fastsd_helpers.tunnels.gate.server import ALIVE_PATH

__all__ = ["answers_nonce", "ask", "port_answers", "wait_for_nonce"]

# So that a service's page for people ("you are about to visit...") does not come instead of the answer.
_HEADERS = {
    "User-Agent": "fastsd_helpers",
    "bypass-tunnel-reminder": "1",
    "ngrok-skip-browser-warning": "1",
    "Cache-Control": "no-cache",
}
_LARGEST_BYTES = 65536


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args: Any, **_more: Any) -> None:
        return None


def ask(url: str, *, timeout_s: float = 10) -> tuple[int, str]:
    """Get a page: its status and the first 64 kB of its text; (0, reason) when nothing answers in time.

    Redirects are not followed.
    """
    result: list[tuple[int, str]] = []

    def work() -> None:
        try:
            # A proxy has a 127.0.0.1 of its own.
            direct = [urllib.request.ProxyHandler({})] if urlsplit(url).hostname in ("127.0.0.1", "localhost") else []
            opener = urllib.request.build_opener(_NoRedirect, *direct)
            with opener.open(urllib.request.Request(url, headers=_HEADERS), timeout=timeout_s) as answer:
                result.append((answer.status, answer.read(_LARGEST_BYTES).decode("utf-8", errors="replace")))
        except urllib.error.HTTPError as err:
            with err:
                result.append((err.code, err.read(_LARGEST_BYTES).decode("utf-8", errors="replace")))
        except (OSError, ValueError) as err:
            result.append((0, str(getattr(err, "reason", err)) or type(err).__name__))

    # A name that is being looked up cannot be interrupted, and a trickle of bytes outlives any socket timeout.
    thread = threading.Thread(target=work, name="fastsd-ask", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return result[0] if result else (0, f"no answer within {timeout_s:g} s")


def port_answers(port: int, *, timeout_s: float = 5) -> bool:
    """Whether something accepts connections on a port of this machine; nothing is sent to it."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=timeout_s):
            return True
    except OSError:
        return False


def answers_nonce(url: str, nonce: str, *, timeout_s: float = 10) -> tuple[bool, str]:
    """Whether a public link leads to the gate with this nonce, and if not, what it led to."""
    status, text = ask(url.rstrip("/") + ALIVE_PATH, timeout_s=timeout_s)
    if status == 200 and text.strip() == nonce:
        return True, ""
    return False, f"HTTP {status}" if status else text


def wait_for_nonce(url: str, nonce: str, deadline: float) -> str:
    """Ask until the link leads here or the deadline (of `time.monotonic`) has passed; returns "" or the last reason.

    A fresh name needs some seconds to be known everywhere.
    """
    pause_s, reason = 0.5, "no answer"
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return reason
        good, reason = answers_nonce(url, nonce, timeout_s=max(0.2, min(10, left)))
        if good:
            return ""
        time.sleep(max(0.0, min(pause_s, deadline - time.monotonic())))
        pause_s = min(4, pause_s * 1.5)
