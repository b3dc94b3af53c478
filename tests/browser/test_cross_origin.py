"""Pages of other origins that a visitor has open beside a link: in a real browser none of them can act as this visitor.

The link has the name that a share service gives, over https; a server of the test's own ends that encryption, as the
service does. Neighbours of that service are the same *site* to a browser, which sends them the visitor's cookie.
"""

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

import pytest

aiohttp = pytest.importorskip("aiohttp")

from tunnel_doubles import serve  # noqa: E402

from browser.lab import find_chromium  # noqa: E402
from fastsd_helpers.tunnels import Gate, Login, open_gate  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LOGIN = Login("fastsd", "right-password-1")
LINK = "https://abc.gradio.live"
# Where the browser asks from -> the address of the page there. `null` is a sandboxed frame on another site.
FOREIGN = {
    "a sibling on the service": "https://evil.gradio.live",
    "another site": "https://evil.example",
    "another port": "https://abc.gradio.live:8443",
    "http instead of https": "http://abc.gradio.live",
    "a sandboxed frame": "https://evil.example",
}
# What acts on each web UI: paths for a post, an upload, a socket and a stream of events.
SITES = {
    "Gradio 3": ("/run/predict", "/upload", "/queue/join", "/queue/data"),
    "playground": ("/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/ws", "/gradio_api/queue/data"),
    "ComfyUI": ("/prompt", "/upload/image", "/ws", "/events"),
}

# Each way of asking, as a page's script: `link` is the address of the link, `paths` those of the web UI behind.
_ACT = """
async ([link, [post, upload, socket, events], mark]) => {
    const done = (start) => new Promise((resolve) => { start(resolve); setTimeout(resolve, 1500); });
    const form = (action, type, fields) => done((resolve) => {
        const frame = document.createElement("iframe");
        frame.name = "f" + Math.random();
        document.body.append(frame);
        const form = Object.assign(document.createElement("form"), {method: "POST", action, target: frame.name});
        form.enctype = type;
        for (const [name, value] of Object.entries(fields)) {
            form.append(Object.assign(document.createElement("input"), {name, value}));
        }
        document.body.append(form);
        frame.onload = () => setTimeout(resolve, 50);
        form.submit();
    });
    const post_with = (path, body, more) => fetch(link + path, {
        method: "POST", credentials: "include", body, mode: "no-cors", ...more
    }).catch(() => null);
    await form(`${link}${post}?${mark}-form`, "text/plain", {data: "paint"});
    await form(`${link}${post}?${mark}-urlencoded`, "application/x-www-form-urlencoded", {data: "paint"});
    await form(`${link}${upload}?${mark}-multipart`, "multipart/form-data", {file: "x"});
    await post_with(`${post}?${mark}-fetch`, "{}");
    const json = {"Content-Type": "application/json"};
    await post_with(`${post}?${mark}-json`, "{}", {mode: "cors", headers: json});
    await post_with(`${post}?${mark}-beacon`, "{}", {keepalive: true});
    navigator.sendBeacon(`${link}${post}?${mark}-sendBeacon`, "{}");
    await fetch(`${link}${post}?${mark}-delete`, {method: "DELETE", credentials: "include"}).catch(() => null);
    await done((resolve) => {
        const ws = new WebSocket(`${link.replace("http", "ws")}${socket}?${mark}-socket`);
        ws.onopen = ws.onclose = resolve;
    });
    await done((resolve) => {
        const source = new EventSource(`${link}${events}?${mark}-events`, {withCredentials: true});
        source.onmessage = source.onerror = () => { source.close(); resolve(); };
    });
    await form(`${link}/.fastsd/login`, "application/x-www-form-urlencoded", {user: "fastsd", password: "guess"});
    return "done";
}
"""
_ACTIONS = ("form", "urlencoded", "multipart", "fetch", "json", "beacon", "sendBeacon", "delete", "socket", "events")
_LOG_OUT = """
async (link) => {
    const form = Object.assign(document.createElement("form"), {method: "POST", action: link + "/.fastsd/logout"});
    const frame = Object.assign(document.createElement("iframe"), {name: "out"});
    form.target = "out";
    document.body.append(frame, form);
    form.submit();
    new Image().src = link + "/.fastsd/logout";
    await fetch(link + "/.fastsd/logout", {credentials: "include", mode: "no-cors"}).catch(() => null);
    await new Promise((resolve) => setTimeout(resolve, 700));
}
"""


class Site:
    """The web UI behind the gate: answers everything, and remembers what arrived and whether a cookie of it did."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def handle(self, request: Any) -> Any:
        from aiohttp import web

        self.seen.append(request.path_qs)
        assert "fastsd_gate" not in request.headers.get("Cookie", "")
        if request.headers.get("Upgrade", "").lower() == "websocket":
            ws = web.WebSocketResponse()
            await ws.prepare(request)
            await ws.close()
            return ws
        if "text/event-stream" in request.headers.get("Accept", ""):
            return web.Response(text="data: 1\n\n", content_type="text/event-stream")
        return web.Response(text=f"<title>the web UI</title><p>{request.method}</p>", content_type="text/html")

    def arrived(self, mark: str) -> set[str]:
        return {path.partition(f"{mark}-")[2] for path in self.seen if f"{mark}-" in path}


async def _evil(_request: Any) -> Any:
    from aiohttp import web

    return web.Response(
        text="""<title>evil</title><a id="go" href="https://abc.gradio.live/?followed">a link</a>
        <iframe id="box" sandbox="allow-scripts allow-forms allow-popups" srcdoc="<p>boxed</p>"></iframe>""",
        content_type="text/html",
    )


@contextlib.contextmanager
def ending_tls(folder: Path, behind: int) -> Iterator[int]:
    """A server that takes the encryption away and passes every byte on, as a share service does; gives its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    def pump(source: Any, target: Any) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(65536):
                target.sendall(part)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def take(raw: Any) -> None:
        with (
            contextlib.suppress(OSError),
            context.wrap_socket(raw, server_side=True) as outer,
            socket.create_connection(("127.0.0.1", behind)) as inner,
        ):
            back = threading.Thread(target=pump, args=(inner, outer), daemon=True)
            back.start()
            pump(outer, inner)
            back.join(20)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=take, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine, which makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return folder


@pytest.fixture(scope="module")
def world(certificate: Path) -> Iterator[tuple[Any, Site, Gate]]:
    """A browser whose visitor is logged in at the link, the site behind it, and the gate."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    site = Site()
    with (
        serve(site.handle) as behind,
        open_gate(behind, LOGIN) as gate,
        serve(_evil) as evil,
        ending_tls(certificate, gate.port) as link_port,
        ending_tls(certificate, evil) as evil_port,
        playwright.sync_playwright() as engine,
    ):
        gate.set_public_url(LINK)
        rules = [
            f"MAP abc.gradio.live:8443 127.0.0.1:{evil_port}",
            f"MAP abc.gradio.live:80 127.0.0.1:{evil}",
            f"MAP abc.gradio.live 127.0.0.1:{link_port}",
            f"MAP evil.gradio.live 127.0.0.1:{evil_port}",
            f"MAP evil.example 127.0.0.1:{evil_port}",
        ]
        arguments = ["--no-sandbox", "--disable-gpu", f"--host-resolver-rules={', '.join(rules)}"]
        arguments += ["--ignore-certificate-errors", "--disable-features=HttpsUpgrades,HttpsFirstBalancedMode"]
        browser = engine.chromium.launch(executable_path=chromium, args=arguments)
        context = browser.new_context(ignore_https_errors=True)
        context.set_default_timeout(60_000)
        log_in(context)
        yield context, site, gate
        browser.close()


def log_in(context: Any) -> None:
    page = context.new_page()
    page.goto(f"{LINK}/?first")
    page.get_by_label("User").fill(LOGIN.user)
    page.get_by_label("Password").fill(LOGIN.password)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url(f"{LINK}/?first")
    assert page.title() == "the web UI"
    page.close()


def is_logged_in(context: Any) -> bool:
    page = context.new_page()
    page.goto(f"{LINK}/?look")
    title = page.title()
    page.close()
    return title == "the web UI"


def test_over_https_the_cookie_belongs_to_this_very_host(world: Any) -> None:
    context, _site, _gate = world
    cookies = [cookie for cookie in context.cookies(LINK) if "fastsd" in cookie["name"]]
    assert [cookie["name"] for cookie in cookies] == ["__Host-fastsd_gate"]
    assert cookies[0]["secure"]
    assert cookies[0]["httpOnly"]


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("place", FOREIGN)
def test_a_page_from_elsewhere_acts_on_nothing(world: Any, place: str, kind: str) -> None:
    context, site, _gate = world
    page = context.new_page()
    page.goto(FOREIGN[place])
    assert page.title() == "evil"
    actor = page.frames[1] if place == "a sandboxed frame" else page
    mark = f"{place}-{kind}".replace(" ", "_")
    assert actor.evaluate(_ACT, [LINK, SITES[kind], mark]) == "done"
    actor.evaluate(_LOG_OUT, LINK)
    page.close()
    assert site.arrived(mark) == set()
    assert is_logged_in(context), "nor is the visitor logged out"


@pytest.mark.parametrize("kind", SITES)
def test_the_links_own_page_acts(world: Any, kind: str) -> None:
    context, site, _gate = world
    page = context.new_page()
    page.goto(f"{LINK}/")
    mark = f"own-{kind}".replace(" ", "_")
    assert page.evaluate(_ACT, [LINK, SITES[kind], mark]) == "done"
    page.close()
    end = time.monotonic() + 20
    while not set(_ACTIONS) <= site.arrived(mark) and time.monotonic() < end:
        time.sleep(0.1)
    assert site.arrived(mark) == set(_ACTIONS)


def test_a_link_that_somebody_sent_opens(world: Any) -> None:
    context, site, _gate = world
    page = context.new_page()
    page.goto(FOREIGN["another site"])
    page.click("#go")
    page.wait_for_url(f"{LINK}/?followed")
    assert page.title() == "the web UI"
    assert "/?followed" in site.seen
    page.close()


def test_a_neighbours_cookie_of_the_same_name_neither_logs_in_nor_out(world: Any) -> None:
    context, _site, _gate = world
    page = context.new_page()
    page.goto(FOREIGN["a sibling on the service"])
    for name in ("fastsd_gate", "__Host-fastsd_gate"):
        page.evaluate(f"document.cookie = '{name}=mine; Domain=gradio.live; Path=/; Secure'")
    assert any(cookie["domain"] == ".gradio.live" for cookie in context.cookies(LINK)), "the browser has taken one"
    assert is_logged_in(context)
    page.close()
    context.clear_cookies(name="__Host-fastsd_gate")
    assert not is_logged_in(context)
    context.clear_cookies()
    log_in(context)


def test_a_program_is_no_page_and_passes_by_header_or_by_its_own_cookie(world: Any) -> None:
    _context, site, gate = world
    passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    passwords.add_password(None, gate.url, LOGIN.user, LOGIN.password)
    by_header = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(passwords))
    assert by_header.open(f"{gate.url}/run/predict?by-header", data=b"{}", timeout=20).status == 200
    by_cookie = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
    form = f"user={LOGIN.user}&password={LOGIN.password}".encode()
    assert by_cookie.open(f"{gate.url}/.fastsd/login", data=form, timeout=20).status == 200
    assert by_cookie.open(f"{gate.url}/run/predict?by-cookie", data=b"{}", timeout=20).status == 200
    assert {"/run/predict?by-header", "/run/predict?by-cookie"} <= set(site.seen)


def test_last_the_links_own_page_logs_out(world: Any) -> None:
    context, _site, _gate = world
    page = context.new_page()
    page.goto(f"{LINK}/")
    page.evaluate(_LOG_OUT, LINK)
    page.close()
    assert not is_logged_in(context)
